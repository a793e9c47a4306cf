"""Chat templates by name, for base models that bring none of their own. Jinja, as transformers renders it."""

TEMPLATES: dict[str, str] = {
    # Taori et al. 2023: the wording that the original Alpaca run was trained with.
    "alpaca": (
        "{{ bos_token or '' }}Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}\n\n"
        "{% elif m.role == 'system' %}{{ m.content }}\n\n"
        "{% else %}### Instruction:\n{{ m.content }}\n\n### Response:\n{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token or '' }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    ),
}
