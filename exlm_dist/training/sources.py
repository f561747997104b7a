"""What a run over several sources says of them: at its start what they will have given by its end, then how far it is
in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exlm_dist.config import RunConfig
from exlm_dist.data.mixed import MixedDataset
from exlm_dist.data.mixture import Mixture
from exlm_dist.utils.logs import get_logger

#: Epochs up to which repeated data are nearly as good as new ones (of causal language models: Muennighoff et al.,
#: "Scaling Data-Constrained Language Models", NeurIPS 2023, section 6).
GOOD_EPOCHS = 4
logger = get_logger(__name__)


@dataclass(frozen=True)
class Sources:
    """The sources of a run and how they are mixed."""

    data: MixedDataset
    mixture: Mixture
    steps: int
    batch: int  # sequences

    @classmethod
    def of(cls, config: RunConfig, data: MixedDataset) -> Sources:
        """The sources of the run `config` over `data`."""
        return cls(data, Mixture.of(config, data.sizes), config.schedule.steps, config.batch.sequences)

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each source in the first `step` steps."""
        counts = self.mixture.counts(step * self.batch)
        return {name: int(count) / size for name, count, size in zip(self.data.sources, counts, self.data.sizes)}

    def metrics(self, step: int, tokens: Sequence[int]) -> dict[str, float]:
        """Metrics after `step` steps, in which each source gave so many tokens."""
        values: dict[str, float] = {}
        for (name, epochs), seen in zip(self.epochs(step).items(), tokens, strict=True):
            values |= {f"progress/{name}/epochs": epochs, f"progress/{name}/tokens": seen}
        return values

    def announce(self) -> None:
        """Log a line for each source, and warn of those that are repeated often."""
        counts, at_end = self.mixture.counts(self.steps * self.batch), self.epochs(self.steps)
        for (name, source), count in zip(self.data.sources.items(), counts.tolist()):
            logger.info(
                "source %s: %s sequences%s, %s tokens in %s; %.1f%% of all that is read, %.2f epochs by step %d",
                name,
                f"{len(source):,}",
                f", {source.forms} forms of each molecule, of which an epoch has one" if source.forms > 1 else "",
                f"{source.index.tokens + 2 * len(source):,}",
                source.path,
                100 * count / (self.steps * self.batch),
                at_end[name],
                self.steps,
            )
        for name, source in self.data.sources.items():
            if (times := at_end[name] / source.forms) > GOOD_EPOCHS:
                logger.warning(
                    "source %s will be read %.1f times; beyond about %d, repeated data are worth less and less "
                    "(Muennighoff et al. 2023, for causal models). A smaller weight, or more data, may do better.",
                    name,
                    times,
                    GOOD_EPOCHS,
                )
