"""A fine-tuned model in use: predictions of its members, their mean and spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exlm_dist.checkpoint.reader import TOKENIZER_FOLDER, read_config
from exlm_dist.finetuning.inputs import as_columns, encode_inputs
from exlm_dist.finetuning.losses import predicted_values
from exlm_dist.finetuning.member import outputs_of, put_weights
from exlm_dist.finetuning.metrics import predicted_classes
from exlm_dist.finetuning.model_folder import load_member, read_finetuned
from exlm_dist.finetuning.property_model import PropertyModel, build_property_model
from exlm_dist.finetuning.targets import Target, output_slices
from exlm_dist.inference.loading import choose_device
from exlm_dist.model.build import build_model
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.utils.outputs import user_path


@dataclass(frozen=True)
class Predictions:
    """Predictions of n rows; NaN for a row that failed. `failures`: row -> reason."""

    targets: tuple[Target, ...]
    mean: np.ndarray  # float64 [n, O], over the members: of values, or of the probabilities of classes
    spread: np.ndarray  # float64 [n, O], standard deviation over the members (n - 1); NaN of a single member
    failures: dict[int, str]

    @staticmethod
    def of_members(targets: Sequence[Target], values: np.ndarray, failures: dict[int, str]) -> Predictions:
        """From what each member predicts, float64 [members, n, O]."""
        spread = np.full(values.shape[1:], np.nan) if len(values) == 1 else values.std(axis=0, ddof=1)
        return Predictions(tuple(targets), values.mean(axis=0), spread, failures)

    def columns(self) -> dict[str, Any]:
        """As columns of a table. Of classes NAME_probability (of the second of two) or NAME_probability_CLASS, of
        values NAME_mean; then NAME_spread (of the probability of the class predicted) and, of classes,
        NAME_prediction."""
        table: dict[str, Any] = {}
        for target, where in zip(self.targets, output_slices(self.targets)):
            mean, spread = self.mean[:, where], self.spread[:, where]
            if target.kind == "multiclass":
                assert target.classes is not None
                table |= {f"{target.name}_probability_{label}": mean[:, n] for n, label in enumerate(target.classes)}
                spread = np.take_along_axis(spread, predicted_classes(mean)[:, None], axis=1)
            else:
                table[f"{target.name}_{'mean' if target.kind == 'regression' else 'probability'}"] = mean[:, 0]
            table[f"{target.name}_spread"] = spread[:, 0]
            if target.kind != "regression":
                table[f"{target.name}_prediction"] = self._labels(target, mean)
        return table

    def best(self) -> list[Any]:
        """For each target the values, float64 [n], or the most probable class as text, None for a row that failed."""
        return [
            self.mean[:, where][:, 0] if target.kind == "regression" else self._labels(target, self.mean[:, where])
            for target, where in zip(self.targets, output_slices(self.targets))
        ]

    def probabilities(self) -> list[np.ndarray]:
        """For each target of classes the probability of each class, float64 [n, classes]."""
        found = []
        for target, where in zip(self.targets, output_slices(self.targets)):
            own = self.mean[:, where]
            found.append(np.concatenate([1 - own, own], axis=1) if target.kind == "binary" else own)
        return found

    def _labels(self, target: Target, mean: np.ndarray) -> list[str | None]:
        assert target.classes is not None
        failed = np.isnan(mean).any(axis=1)
        return [None if bad else target.classes[n] for bad, n in zip(failed, predicted_classes(mean))]


@dataclass(frozen=True)
class FinetunedModel:
    """An ensemble of fine-tuned models on one device.

    Args:
        inputs: names of the column of texts, or of the two of pairs. max_tokens: most tokens of a row, BOS and EOS not
        counted; a longer one fails, or with `truncate` loses its end.
    """

    tokenizer: Tokenizer
    inputs: tuple[str, ...]
    targets: tuple[Target, ...]
    members: tuple[PropertyModel, ...]
    max_tokens: int
    truncate: bool = False

    def predict(self, rows: Any, return_std: bool = False) -> Any:
        """What is predicted for each of `rows` (texts, for a model of pairs pairs of texts, or a DataFrame with the
        model's columns of inputs).

        An array [n], or [n, targets] if there are several: of values in their own unit, NaN for a row that failed; or
        of classes as text, None for a row that failed. `return_std`: also the spread over the members, of values or
        of the probability of the class predicted.
        """
        predictions = self.predict_rows(as_columns(rows, self.inputs))
        best = [
            np.asarray(one, None if target.kind == "regression" else object)
            for target, one in zip(self.targets, predictions.best())
        ]
        spread = [predictions.columns()[f"{target.name}_spread"] for target in self.targets]
        several = len(self.targets) > 1
        joined = [np.stack(one, axis=1) if several else one[0] for one in (best, spread)]
        return (joined[0], joined[1]) if return_std else joined[0]

    def predict_proba(self, rows: Any) -> Any:
        """Probability of each class, [n, classes] in the order of `targets[0].classes`; NaN for a row that failed. A
        list of such arrays if there are several targets. AttributeError for a model of values."""
        if self.targets[0].kind == "regression":
            raise AttributeError("the model predicts values, which have no probability: call predict.")
        found = self.predict_rows(as_columns(rows, self.inputs)).probabilities()
        return found if len(found) > 1 else found[0]

    def predict_rows(self, columns: Sequence[Sequence[str | None]]) -> Predictions:
        """Predictions for the rows of the columns of inputs."""
        encoded = encode_inputs(self.tokenizer, columns, max_tokens=self.max_tokens, truncate=self.truncate)
        values = np.full((len(self.members), len(columns[0]), self.outputs), np.nan)
        values[:, encoded.rows] = self.predict_encoded(encoded.tokens, encoded.lengths)
        return Predictions.of_members(self.targets, values, encoded.failures)

    @torch.inference_mode()
    def predict_encoded(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """What each member predicts for encoded rows, float64 [members, m, O]."""
        values = np.empty((len(self.members), len(lengths), self.outputs))
        for number, member in enumerate(self.members):
            for chosen, outputs in outputs_of(member.eval(), tokens, lengths):
                values[number, chosen] = predicted_values(outputs, self.targets).cpu().numpy()
        return values

    @property
    def outputs(self) -> int:
        """Outputs of each member, O."""
        return sum(target.outputs for target in self.targets)


def load_finetuned(path: Path | str, device: str = "auto") -> FinetunedModel:
    """Load the folder that `exlm finetune` wrote. CheckpointError if it is not whole; ConfigError for a device that is
    not there."""
    folder, place = user_path(path), choose_device(device)
    content = read_finetuned(folder)
    config, tokenizer = read_config(folder), load_tokenizer(folder / TOKENIZER_FOLDER)
    targets = tuple(Target.from_json(target) for target in content["targets"])
    outputs, pooling = sum(target.outputs for target in targets), content["settings"]["pooling"]
    body = build_model(config.model, tokenizer.vocab_size, seed=0, kernel_backend=config.kernels.backend)
    members = []
    for number, member in enumerate(content["members"]):
        model = build_property_model(body, config.model, outputs, seed=0, pooling=pooling, dropout=0.0, frozen=False)
        put_weights(model, load_member(folder, number, member["sha256"]))
        members.append(model.to(place).eval())
    return FinetunedModel(
        tokenizer,
        tuple(content["inputs"]),
        targets,
        tuple(members),
        config.model.max_positions - 2,
        content["settings"]["truncate"],
    )
