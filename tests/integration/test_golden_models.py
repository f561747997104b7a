"""The whole model against the authors' code: features, scores, paths, loss, every gradient, thirty updates.

Rows on which their code has an accident are left out, and each test asserts that rows remain to compare:
- phantom rows (shorter than the batch's longest expansion and not padded): copies of the last token are attended to;
- rows that do not end in an expanded position (cut blocks): with maximal transition length -1 they have no path,
  with 99999 the last target is emitted by an ordinary token.
With -1 both kinds have likelihood 0 and give no gradient, so there the gradient of the other rows is that of the batch.
With 99999 their gradient is mixed into the recorded one, so gradients are compared in the batches without such rows.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from golden import Case, Golden, golden_cases, golden_files
from safetensors.torch import save_file

from exlm_dist.config.schema import ModelConfig
from exlm_dist.export.fairseq import from_fairseq, to_fairseq
from exlm_dist.export.import_fairseq import import_fairseq
from exlm_dist.inference.loading import load_checkpoint
from exlm_dist.kernels.dag import dag_best_path
from exlm_dist.model.build import LanguageModel, build_model
from exlm_dist.model.objective import loss_sum
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer
from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL

BOS, PAD, EOS = 0, 1, 2
MAX_POSITIONS = 96
KEY_BIAS = "encoder.key_linear.bias"  # its gradient is 0 in exact arithmetic and noise in theirs
TIED_COPY = "encoder.lm_head.weight"
# Largest deviations that golden/README.md reports between their own float32 and float64 runs.
FEATURES, LOGITS, LINKS, LOG_LIKELIHOOD, LOSS, GRADIENT = 5e-6, 2e-5, 1e-5, 2e-5, 2e-6, 4e-6
FP64_FRACTION = 0.2  # our fp64 run (angles stay fp32) against theirs, whose larger arrays are stored in fp32


class Batch:
    """Their [B, S] batch: which rows are clean, and these rows as a Stream."""

    def __init__(self, source: np.ndarray, target: np.ndarray, states: int) -> None:
        rows = [self._row(s, t, states) for s, t in zip(source, target)]
        lengths = [len(row["clone"]) for row in rows]
        longest = max(lengths)
        padded = (source == PAD).any(1)
        ends_expanded = [bool(row["clone"][-1]) for row in rows]
        self.clean = [b for b in range(len(rows)) if ends_expanded[b] and (padded[b] or lengths[b] == longest)]
        self.size = len(rows)
        self.rows = [rows[b] for b in self.clean]
        self.stream = self._stream(states) if self.rows else None

    @staticmethod
    def _row(source: np.ndarray, target: np.ndarray, states: int) -> dict[str, np.ndarray]:
        real = source != PAD
        source, target = source[real], target[real]
        expanded = (target != PAD) | (source == BOS) | (source == EOS)
        copies = np.where(expanded, states, 1)
        place = np.repeat(np.arange(len(source)), copies)
        first = np.cumsum(copies) - copies
        clone = np.where(expanded[place], np.arange(len(place)) - first[place] + 1, 0)
        wanted = np.where(target != PAD, target, source)[expanded]
        return {"input_ids": source[place], "position": place, "clone": clone, "target_ids": wanted}

    def _stream(self, states: int) -> Stream:
        packed = {
            name: torch.from_numpy(np.concatenate([row[name] for row in self.rows]).astype(np.int64))
            for name in ("input_ids", "position", "clone", "target_ids")
        }
        tokens = np.array([len(row["clone"]) for row in self.rows])
        targets = np.array([len(row["target_ids"]) for row in self.rows])

        def starts(lengths: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

        return Stream(
            **packed,
            cu_tokens=starts(tokens),
            state_index=packed["clone"].nonzero()[:, 0],
            cu_states=starts(states * targets),
            cu_targets=starts(targets),
            dropout_seed=torch.zeros(1, dtype=torch.int64),
            max_tokens=int(tokens.max()),
            max_states=int(states * targets.max()),
            max_targets=int(targets.max()),
            states=states,
        )


def build(
    settings: dict[str, Any], weights: dict[str, np.ndarray], dtype: torch.dtype, train: bool = False
) -> LanguageModel:
    config = model_config(settings)
    vocabulary = len(weights["encoder.lm_head.bias"])
    mask = vocabulary - 1
    model = build_model(config, vocabulary, seed=0, token_dropout=mask if settings.get("token_dropout") else None)
    ours = from_fairseq({name: torch.from_numpy(value) for name, value in weights.items()})
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected and set(missing) <= {"output.weight"}
    return model.to(dtype).train(train)


def model_config(settings: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        layers=settings["layers"],
        width=settings["d"],
        heads=settings["heads"],
        ffn=settings["ffn"],
        states=settings["k"],
        norm="pre" if settings.get("prenorm", True) else "post",
        tie_head=not settings.get("untie", False),
        jump_prior="none",
        dropout=0.0,
        attention_dropout=0.0,
        max_positions=MAX_POSITIONS,
    )


def model_cases() -> list[tuple[str, str]]:
    return [(file, name) for file in golden_files("model_") for name in golden_cases(file)]


def open_case(file: str, name: str, dtype: torch.dtype) -> tuple[Case, Batch, LanguageModel]:
    golden = Golden(file)
    case = golden.case(name)
    settings = case.settings["config"]
    weights = golden.group(f"{name.split('/')[0]}/w/")
    batch = Batch(case["in/src_tokens"], case["in/target"], settings["k"])
    return case, batch, build(settings, weights, dtype, case.settings["train_mode"])


def compare(ours: torch.Tensor, theirs: np.ndarray | torch.Tensor, tolerance: float, what: str) -> None:
    ours_dtype = ours.dtype
    ours, theirs = ours.detach().double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, what
    assert torch.equal(ours.isinf(), theirs.isinf()), what
    error = torch.where(ours.isinf(), 0.0, (ours - theirs).abs())
    finite = theirs[theirs.isfinite()].abs()
    allowed = tolerance * (float(finite.max().clamp(min=1.0)) if len(finite) else 1.0)
    if ours_dtype == torch.float64:
        allowed *= FP64_FRACTION
    assert error.max() <= allowed, f"{what}: off by {error.max():.2e}, allowed {allowed:.2e}"


def compare_gradients(model: LanguageModel, theirs: dict[str, np.ndarray], tolerance: float) -> None:
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    ours = to_fairseq(gradients)
    compared = 0
    for name, gradient in theirs.items():
        compare(ours[name], gradient, tolerance, f"gradient of {name}")
        compared += 1
    assert compared >= len(gradients), "every parameter has a recorded gradient"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("file,name", model_cases())
def test_model(file: str, name: str, dtype: torch.dtype) -> None:
    case, batch, model = open_case(file, name, dtype)
    settings = case.settings
    for row, length in zip(range(batch.size), settings["expanded_length"]):
        assert row not in batch.clean or length == len(batch.rows[batch.clean.index(row)]["clone"])
    assert not any(settings["phantom_rows"][row] for row in batch.clean)
    limit = settings["config"].get("mtl", -1)
    if limit == -1:
        assert {row for row in range(batch.size) if not settings["invalid"][row]} == set(batch.clean)
    if not batch.rows:
        assert limit != -1 or float(case["out/loss"]) == 0.0
        pytest.skip("every row of this batch is cut inside a sequence (see the head of this file)")
    stream, hidden = batch.stream.replace(select=False), []
    for layer in model.layers[:-1]:
        stream = layer(stream)
        hidden.append(stream.hidden)
    check_hidden(case, batch, hidden)
    stream = model(batch.stream)
    check_scores(case, batch, stream)
    total, invalid = loss_sum(stream, "sequence")
    assert not invalid.any()
    clean = len(batch.clean) == batch.size
    if clean or limit == -1:
        compare(total / batch.size, case["out/loss"], LOSS, "loss")
    theirs = case.group("grad/")
    if theirs and (clean or limit == -1):
        (total / batch.size).backward()
        compare_gradients(model, theirs, GRADIENT)


def check_hidden(case: Case, batch: Batch, hidden: list[torch.Tensor]) -> None:
    """Embedding, each block, and the final norm, at every token of the clean rows."""
    names = ["hid_x0", *(f"hid_layer{i}" for i in range(len(hidden) - 2)), "features"]
    for name, values in zip(names, hidden):
        if f"out/{name}" not in case:
            continue
        theirs = np.concatenate([case[f"out/{name}"][b, : len(r["clone"])] for b, r in zip(batch.clean, batch.rows)])
        compare(values, theirs, FEATURES, name)


def check_scores(case: Case, batch: Batch, stream: Stream) -> None:
    """Match, transitions, likelihood and best path of the clean rows, each restricted to its states."""
    paths, scores = dag_best_path(stream.match, stream.transitions, stream.num_targets, stream.num_states)
    compare(stream.log_likelihood, case["out/loglik"][batch.clean], LOG_LIKELIHOOD, "log-likelihood")
    compare(scores, case["out/best_score"][batch.clean], LOG_LIKELIHOOD, "best score")
    for i, (b, row) in enumerate(zip(batch.clean, batch.rows)):
        places = np.flatnonzero(row["clone"])
        count, states = len(row["target_ids"]), len(places)
        links = case["out/links"][b][places][:, places]
        compare(stream.transitions[i, :states, :states], links, LINKS, f"links of row {b}")
        logits = torch.as_tensor(case["out/logits"][b][places]).double()
        match = logits.log_softmax(-1)[:, row["target_ids"]].T
        compare(stream.match[i, :count, :states], match, LOGITS, f"match of row {b}")
        assert np.array_equal(paths[i, :states].numpy(), case["out/path"][b][places]), f"path of row {b}"


@pytest.mark.parametrize("file", golden_files("model_"))
def test_the_imported_model(file: str, tmp_path: Path) -> None:
    """Through `exlm import fairseq` and a checkpoint, with our ids: `<mask>` is 4 and the words come after it."""
    golden = Golden(file)
    for name, settings in golden.cases.items():
        case, batch, _ = open_case(file, name, torch.float32)
        if batch.rows and not settings["train_mode"]:
            break
    else:
        pytest.skip("no case of this file is in evaluation mode and has a clean row")
    weights = golden.group(f"{name.split('/')[0]}/w/")
    vocabulary = len(weights["encoder.lm_head.bias"])
    save_file({key: torch.from_numpy(value) for key, value in weights.items()}, tmp_path / "theirs.safetensors")
    words = Counter({f"[{number}H]": 1 for number in range(NUM_SPECIAL, vocabulary)})
    SmilesTokenizer.from_counts(words, {"stereo": "keep", "salts": "keep"}).save(tmp_path / "tokenizer")
    section = model_config(settings["config"]).model_dump()
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": section}))
    import_fairseq(
        tmp_path / "theirs.safetensors",
        tmp_path / "out",
        tokenizer=tmp_path / "tokenizer",
        config=tmp_path / "model.yaml",
    )
    ours = torch.tensor([*range(MASK), *range(MASK + 1, vocabulary), MASK])
    stream = batch.stream.replace(input_ids=ours[batch.stream.input_ids], target_ids=ours[batch.stream.target_ids])
    with torch.no_grad():
        check_scores(case, batch, load_checkpoint(tmp_path / "out", device="cpu").model(stream))


@pytest.mark.parametrize("file", golden_files("model_"))
def test_enough_rows_are_compared(file: str) -> None:
    """At least half of the recorded rows of every file; with blocks and phantoms by design, a quarter."""
    rows = clean = 0
    for name, settings in Golden(file).cases.items():
        case = Golden(file).case(name)
        batch = Batch(case["in/src_tokens"], case["in/target"], settings["config"]["k"])
        rows, clean = rows + batch.size, clean + len(batch.clean)
    ragged = all(settings["kind"] in ("ragged", "bosmask", "multi") for settings in Golden(file).cases.values())
    assert clean >= rows * (1.0 if ragged else 0.25), f"{clean} of {rows} rows"


@pytest.mark.parametrize("name", golden_cases("cls.npz"))
def test_classification_features(name: str) -> None:
    """Unmasked sequences: BOS and every EOS are still expanded; the head reads the first state of BOS."""
    golden = Golden("cls.npz")
    case = golden.case(name)
    settings = case.settings["config"]
    weights = golden.group(f"{name.split('/')[0]}/w/")
    head = {key.split(".", 2)[2]: torch.from_numpy(value) for key, value in weights.items() if "classification" in key}
    head = {key: value.requires_grad_() for key, value in head.items()}
    source = case["in/src_tokens"]
    batch = Batch(source, np.full_like(source, PAD), settings["k"])
    assert [b for b, phantom in enumerate(case.settings["phantom_rows"]) if not phantom] == batch.clean
    assert len(batch.clean) >= 1
    model = build(settings, weights, torch.float32)
    stream = batch.stream.replace(select=False)
    for layer in model.layers[:-1]:
        stream = layer(stream)
    theirs = np.concatenate([case["out/features"][b, : len(r["clone"])] for b, r in zip(batch.clean, batch.rows)])
    compare(stream.hidden, theirs, FEATURES, "features")
    pooled = stream.hidden[stream.cu_tokens[:-1]]
    inner = torch.tanh(pooled @ head["dense.weight"].T + head["dense.bias"])
    logits = inner @ head["out_proj.weight"].T + head["out_proj.bias"]
    compare(logits, case["out/cls_logits"][batch.clean], FEATURES, "class logits")
    gradients = case.group("grad/")
    if gradients and len(batch.clean) == batch.size:
        loss = torch.nn.functional.cross_entropy(logits, case.tensor("in/labels"), reduction="sum")
        compare(loss, case["out/cls_loss_sum"], LOSS, "loss")
        loss.backward()
        compare_gradients(model, {n: g for n, g in gradients.items() if n.startswith("encoder.")}, GRADIENT)
        for key, value in head.items():
            compare(value.grad, gradients[f"classification_heads.sentence_classification_head.{key}"], GRADIENT, key)


class AuthorsAdam:
    """Their optimizer: decay on every parameter first, and an eps that is not bias-corrected (unlike torch's)."""

    def __init__(self, parameters: list[torch.nn.Parameter], settings: dict[str, Any]) -> None:
        options = dict(zip(settings["hp"][::2], settings["hp"][1::2]))
        self.parameters = parameters
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.betas, self.eps = settings["betas"], settings["eps"]
        self.decay, self.clip = float(options["--weight-decay"]), float(options["--clip-norm"])

    @torch.no_grad()
    def step(self, update: int, rate: float) -> float:
        """Apply update number `update` (from 1); returns the norm of the gradient before clipping."""
        norm = float(torch.stack([p.grad.norm() for p in self.parameters]).norm())
        scale = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        b1, b2 = self.betas
        size = rate * (1 - b2**update) ** 0.5 / (1 - b1**update)
        for p, (m, v) in zip(self.parameters, self.moments):
            gradient = p.grad * scale
            m.mul_(b1).add_(gradient, alpha=1 - b1)
            v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
            p.mul_(1 - rate * self.decay)
            p.addcdiv_(m, v.sqrt().add_(self.eps), value=-size)
            p.grad = None
        return norm


def trajectory_cases() -> list[tuple[str, str]]:
    return [(file, name) for file in golden_files("traj_") for name in golden_cases(file)]


@pytest.mark.parametrize("file,name", trajectory_cases())
def test_trajectory(file: str, name: str) -> None:
    """Thirty updates from their initial weights: loss, gradient norm and final weights."""
    golden = Golden(file)
    case = golden.case(name)
    settings = case.settings["config"]
    initial = {key.removeprefix("w0/"): value for key, value in case.group("w0/").items()}
    model = build(settings, initial, torch.float64, train=True)
    optimizer = AuthorsAdam(list(model.parameters()), case.settings)
    pool = [Batch(s, t, settings["k"]) for s, t in zip(case["in/src_tokens"], case["in/target"])]
    assert sum(len(batch.clean) for batch in pool) >= sum(batch.size for batch in pool) // 2
    for step, order in enumerate(case["in/order"]):
        losses = []
        for index in order:
            total, invalid = loss_sum(model(pool[index].stream), "sequence")
            assert not invalid.any()
            losses.append(total / pool[index].size)
        loss = sum(losses) / len(losses)
        loss.backward()
        compare(
            torch.stack(losses), case["out/microbatch_loss"][step], 6e-7 / FP64_FRACTION, f"losses of update {step}"
        )
        norm = optimizer.step(step + 1, float(case["out/lr"][step]))
        assert norm == pytest.approx(float(case["out/grad_norm"][step]), abs=2e-5), f"gradient norm of update {step}"
    ours = to_fairseq(dict(model.named_parameters()))
    for key, value in case.group("w30/").items():
        first = 2 if key == "encoder.link_positional.weight" else 0  # rows that nothing reads are not kept
        compare(ours[key][first:], value[first:], 2e-5 if key == KEY_BIAS else 5e-6, f"final {key}")


@pytest.mark.parametrize("file", golden_files("model_") + golden_files("traj_"))
def test_authors_weights_come_back_equal(file: str) -> None:
    golden = Golden(file)
    prefixes = {name[: name.index("/w") + 1] + name.split("/")[1] + "/" for name in golden.names() if "/w" in name}
    assert prefixes
    for prefix in prefixes:
        theirs = {name: torch.from_numpy(value) for name, value in golden.group(prefix).items()}
        back = to_fairseq(from_fairseq(theirs))
        assert set(back) - set(theirs) <= {TIED_COPY}
        for name, value in theirs.items():
            first = 2 if name == "encoder.link_positional.weight" else 0
            assert torch.equal(back[name][first:], value[first:]), name
