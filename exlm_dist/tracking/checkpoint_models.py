"""Evaluated checkpoints of a run as LoggedModels of MLflow, by whose metrics they are ranked, and as versions in its
model registry. Their weights stay in the run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlm_dist.tracking.uri import redact
from exlm_dist.utils.logs import get_logger

UID_TAG = "exlm.uid"
MODEL_TYPE = "checkpoint"
#: Alias of the version that was registered last.
ALIAS = "champion"
#: Parameters of the run that become those of its models; the others are a click away, at the run.
PARAMETERS = ("model.", "masking.ratio", "optim.lr", "batch.sequences", "schedule.steps", "seed", "budget")
PARAMETERS += ("data.path", "data.sources", "phases")
LONGEST = 500
MOST_MODELS = 1000
logger = get_logger(__name__)


class CheckpointModels:
    """The LoggedModels of one run, found again by a tag with the uid of the run and the step.

    Args:
        client: MlflowClient. experiment, run_id, name: of the run. uid: from its events.
    """

    def __init__(self, client: Any, experiment: str, run_id: str, name: str, uid: str) -> None:
        self._client, self._experiment, self._run_id = client, experiment, run_id
        self._name, self._uid = name, uid
        self._known: dict[int, str] = {}

    def of_step(self, step: int, tags: Mapping[str, str]) -> str:
        """Id of the model of a checkpoint, created if it is not there, with these tags."""
        if step not in self._known:
            query = f"tags.`{UID_TAG}` = '{self._uid_of(step)}'"
            found = self._client.search_logged_models([self._experiment], query, max_results=1)
            self._known[step] = found[0].model_id if found else self._create(step)
        model = self._known[step]
        self._client.set_logged_model_tags(model, {key: redact(str(value)) for key, value in tags.items()})
        self._client.finalize_logged_model(model, "READY")
        return model

    def give_up(self, step: int) -> None:
        """The weights of later steps were given up: their models have failed, until the steps are evaluated again."""
        query = f"source_run_id = '{self._run_id}'"
        for model in self._client.search_logged_models([self._experiment], query, max_results=MOST_MODELS):
            own = model.tags.get(UID_TAG, "").rpartition("/")[2]
            if own.isdigit() and int(own) > step:
                self._client.finalize_logged_model(model.model_id, "FAILED")

    def register(self, step: int, name: str, why: str, tags: Mapping[str, str]) -> None:
        """Make the checkpoint a version of the registered model `name`, once, and give it the alias `champion`."""
        model, uid = self.of_step(step, tags), self._uid_of(step)
        if not self._client.search_registered_models(f"name = '{name}'", max_results=1):
            self._client.create_registered_model(name)
        versions = self._client.search_model_versions(f"name = '{name}'")
        found = next((one for one in versions if one.tags.get(UID_TAG) == uid), None)
        if found is None:
            source = self._client.get_logged_model(model).artifact_location
            own = {UID_TAG: uid, **{key: tags[key] for key in tags if key.startswith(("checkpoint.", "budget"))}}
            found = self._client.create_model_version(
                name, source, self._run_id, tags=own, description=why, model_id=model
            )
        self._client.set_registered_model_alias(name, ALIAS, found.version)
        logger.info("MLflow: %s@%d is version %s of the registered model %s", self._name, step, found.version, name)

    def _uid_of(self, step: int) -> str:
        return f"{self._uid}/checkpoint/{step}"

    def _create(self, step: int) -> str:
        """A model whose weights are elsewhere, as `mlflow.create_external_model` makes it."""
        from mlflow.models.utils import get_external_mlflow_model_spec
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

        params = self._client.get_run(self._run_id).data.params
        model = self._client.create_logged_model(
            self._experiment,
            name=f"{self._name}-step-{step}",
            source_run_id=self._run_id,
            tags={UID_TAG: self._uid_of(step), "checkpoint.step": str(step), MLFLOW_MODEL_IS_EXTERNAL: "true"},
            params={key: value[:LONGEST] for key, value in params.items() if key.startswith(PARAMETERS)},
            model_type=MODEL_TYPE,
        )
        with tempfile.TemporaryDirectory() as folder:  # without this file it could not be registered
            get_external_mlflow_model_spec(model).save(str(Path(folder) / "MLmodel"))
            self._client.log_model_artifacts(model.model_id, folder)
        return model.model_id
