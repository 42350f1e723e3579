"""The format of DeepSeek-Coder-Instruct (the first Coder, and 7B-v1.5): roles are headings, turns end with ``<|EOT|>``.

    {bos}{system}### Instruction:\\n{question}\\n### Response:\\n{answer}\\n<|EOT|>\\n### Instruction:\\n…\\n
    ### Response:\\n

Source: tokenizer_config.json of deepseek-coder-33b-instruct and the README of DeepSeek-Coder (whose wording of the
system prompt differs in two capitals and a full stop; this is the file's). A system message of one's own replaces the
prompt; the published program puts nothing between it and what follows.
"""

from nautile.text.templates.messages import Conversation, content, refuse_tools

END_OF_TURN = "<|EOT|>"
SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\n"
)
"""The system prompt that the instruct models were trained with."""


def render(conversation: Conversation) -> str:
    """The text after which the model answers."""
    refuse_tools(conversation, "Coder")
    parts = [conversation.bos]
    if not any(message["role"] == "system" for message in conversation.messages):
        parts.append(SYSTEM)
    for message in conversation.messages:
        text = content(message)
        match message["role"]:
            case "system":
                parts.append(text)
            case "user":
                parts.append(f"### Instruction:\n{text}\n")
            case _:
                parts.append(f"### Response:\n{text}\n{END_OF_TURN}\n")
    return "".join([*parts, "### Response:\n"])
