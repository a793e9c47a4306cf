"""Chat templates by name, for base models that bring none of their own. Jinja, as transformers renders it."""

TEMPLATES: dict[str, str] = {
    # Taori et al. 2023: the two prompts, word for word, that the original Alpaca run was trained with.
    "alpaca": (
        "{{ bos_token or '' }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}\n\n"
        "{% elif m.role == 'system' %}{{ m.content }}\n\n"
        "{% else %}Below is an instruction that describes a task"
        "{% if '### Input:' in m.content %}, paired with an input that provides further context{% endif %}. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ m.content }}\n\n### Response:\n{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token or '' }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    ),
}
