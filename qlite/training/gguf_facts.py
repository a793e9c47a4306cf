"""What a finished run tells GGUF files and Ollama beside its weights: name, template, the tokens that end an answer, system message."""

from qlite.formats.gguf_merged import Saying
from qlite.formats.go_template import go_template
from qlite.formats.modelfile import modelfile
from qlite.training.open_run import OpenRun


def run_saying(opened: OpenRun, name: str) -> Saying:
    """Return what the GGUF file of the run says of it."""
    return Saying(name, opened.encoder.template, tuple(opened.encoder.stop_ids))


def run_modelfile(opened: OpenRun, file: str, is_adapter: bool) -> str | None:
    """Return the Modelfile to lie beside ``file``; None for the adapter of a base that is no GGUF file, which Ollama has no FROM for."""
    source = [f"FROM ./{file}"]
    if is_adapter:
        files = opened.base.checkpoint.files
        if files.gguf is None:
            return None
        source = [f"FROM {files.folder / files.gguf}", f"ADAPTER ./{file}"]
    tokenizer, encoder = opened.base.tokenizer, opened.encoder
    template = None
    if encoder.template is not None:
        template = go_template(encoder.text_of, encoder.template, tokenizer.bos_token or "", encoder.begins_with_token)
    stops = tokenizer.convert_ids_to_tokens(encoder.stop_ids)
    return modelfile(source, template, stops, opened.run.result["system"], is_raw=encoder.template is None)
