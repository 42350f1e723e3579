"""What a finished run exports is a model for others, too: weights, configuration and tokenizer in one folder."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nautile


def test_transformers_reads_the_export_and_writes_the_same_text(straight):
    """Greedy text from the same prompt, through each library's own tokenizer and its own model."""
    llm = nautile.LLM(straight.path)
    params = nautile.SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    ours = llm.generate("def mean(total):", params)[0]
    tokenizer = AutoTokenizer.from_pretrained(straight.model)
    model = AutoModelForCausalLM.from_pretrained(straight.model, dtype=torch.float32)
    prompt = tokenizer("def mean(total):", return_tensors="pt").input_ids
    # Without a mask, transformers takes the begin token for padding: their ids are the same here.
    seen = torch.ones_like(prompt)
    out = model.generate(
        prompt, attention_mask=seen, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    theirs = out[0, prompt.shape[1] :]
    assert ours.token_ids == theirs.tolist()
    assert ours.text == tokenizer.decode(theirs, skip_special_tokens=True)
