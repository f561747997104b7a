"""What is done with an export where exlm_dist is not installed. `test_hf.py` starts it with `python -I -S`.

Arguments: folder with the installed packages, exported folder, folder with what our model says (`stored.safetensors`,
`texts.json`), folder to write to.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def main(packages: str, exported: str, stored: str, scratch: str) -> None:
    sys.path.append(packages)
    assert importlib.util.find_spec("exlm_dist") is None
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    wanted = load_file(Path(stored, "stored.safetensors"))
    texts = json.loads(Path(stored, "texts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    hidden_states_are_the_stored_ones(exported, tokenizer, texts, wanted)
    masks_are_filled(exported, tokenizer, texts, wanted)
    trainer_trains(exported, tokenizer, texts, scratch)
    assert "exlm_dist" not in sys.modules


def hidden_states_are_the_stored_ones(exported, tokenizer, texts, wanted) -> None:
    import torch
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    with torch.no_grad():
        found = encoder(**batch).last_hidden_state
    assert ((found - wanted["hidden"]) * batch["attention_mask"][..., None]).abs().max() < 1e-5


def masks_are_filled(exported, tokenizer, texts, wanted) -> None:
    import torch
    from transformers import AutoModelForMaskedLM, pipeline

    model = AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True).eval()
    with torch.no_grad():
        out = model(wanted["masked_ids"], wanted["masked_attention"], output_hidden_states=True)
        last = model.exlm.norm(out.hidden_states[-1])
    assert ((last - wanted["masked_hidden"]) * wanted["expanded_attention"][..., None]).abs().max() < 1e-5
    places = wanted["masked_ids"] == tokenizer.mask_token_id
    assert (out.logits[places] - wanted["distribution"]).abs().max() < 2e-5

    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    one, two = f"CC{tokenizer.mask_token}C", f"c1ccc{tokenizer.mask_token}c{tokenizer.mask_token}1"
    ids = tokenizer(two, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits[ids == tokenizer.mask_token_id].exp().topk(3)
    first, second = fill([one, two], top_k=3, batch_size=2)
    assert len(first) == 3 and len(second) == 2
    for place, found in enumerate(second):
        assert [guess["token"] for guess in found] == expected.indices[place].tolist()
        assert all(abs(guess["score"] - p) < 1e-5 for guess, p in zip(found, expected.values[place].tolist()))
    assert {guess["token_str"] for guess in fill(one, targets=["C", "O"])} == {"C", "O"}


def trainer_trains(exported, tokenizer, texts, scratch) -> None:
    import torch
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model = AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=scratch, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True,
        gradient_accumulation_steps=2, report_to=[], disable_tqdm=True, save_strategy="no", eval_strategy="steps",
        eval_steps=3,
    )  # fmt: skip
    data = [tokenizer(text) for text in texts]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer),
        processing_class=tokenizer,
    )
    assert trainer.train().global_step == 3
    assert all(torch.isfinite(value).all() for value in model.parameters())
    assert not any(torch.equal(before[name], value) for name, value in model.named_parameters() if "dense" in name)
    trainer.save_model(scratch)
    again = AutoModelForMaskedLM.from_pretrained(scratch, trust_remote_code=True)
    assert all(torch.equal(value, dict(again.named_parameters())[name]) for name, value in model.named_parameters())


if __name__ == "__main__":
    main(*sys.argv[1:])
