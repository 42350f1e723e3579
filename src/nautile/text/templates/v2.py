"""The format of DeepSeek-LLM, DeepSeekMoE, V2, V2-Lite and Coder-V2: roles are words.

    {bos}{system}\\n\\nUser: {question}\\n\\nAssistant: {answer}{eos}User: {question}\\n\\nAssistant:

Sources: the READMEs of DeepSeek-V2, DeepSeek-Coder-V2 and DeepSeek-MoE, and tokenizer_config.json of V2. No space
follows the last colon: with one, the Lite models change language or repeat themselves (README of Coder-V2).
"""

from nautile.text.templates.messages import Conversation, content, refuse_tools


def render(conversation: Conversation) -> str:
    """The text after which the model answers."""
    refuse_tools(conversation, "V2")
    parts = [conversation.bos]
    for message in conversation.messages:
        text = content(message)
        match message["role"]:
            case "system":
                parts.append(f"{text}\n\n")
            case "user":
                parts.append(f"User: {text}\n\n")
            case _:
                parts.append(f"Assistant: {text}{conversation.eos}")
    return "".join([*parts, "Assistant:"])
