"""What a session checks before it trains."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_run import make_config

from exlm_dist.data.recipe import Recipe
from exlm_dist.training.session import _check_lengths
from exlm_dist.utils.errors import ConfigError


@pytest.mark.parametrize("train, valid", [([30, 90], [40, 60]), ([30, 40], [60, 90]), ([50, 60], None)])
@pytest.mark.parametrize("ratios", [{"ratio": 0.1, "eval_ratio": 0.5}, {"ratio": 0.5, "eval_ratio": 0.1}])
def test_the_positions_that_the_message_asks_for_are_enough_for_training_and_evaluation(train, valid, ratios):
    def check(positions: int) -> None:
        config = make_config(Path("runs"), "run", Path("data"), masking=ratios)
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"max_positions": positions}),
                    "evaluation": config.evaluation.model_copy(update={"sequences": 2})}
        )  # fmt: skip
        evaluated = {} if valid is None else {"": SimpleNamespace(lengths=np.array([*valid, 500]))}
        start = SimpleNamespace(train_data=SimpleNamespace(lengths=np.array(train)), held_out=evaluated)
        _check_lengths(config, start, Recipe.of(config, 50))

    with pytest.raises(ConfigError) as caught:
        check(64)
    enough = int(re.search(r"Set model.max_positions to (\d+)", str(caught.value))[1])
    check(enough)
    with pytest.raises(ConfigError):
        check(enough - 1)
