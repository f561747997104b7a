"""The graph of ExLM (arXiv 2501.13397): masks to states, transitions between states, marginals over all paths.

B sequences, L tokens, E tokens after the expansion, D width, H heads, P head width, N expanded positions (targets) of a
sequence, S = k N states.
"""

import torch
from torch import Tensor, nn

from .configuration_exlm import ExLMConfig

#: Log-probability of what is impossible: finite, so that no gradient becomes NaN.
NEVER = -1e30


def expand_masks(
    input_ids: Tensor, attention_mask: Tensor | None, mask_token_id: int, states: int, anchors: bool
) -> dict[str, Tensor]:
    """Each `<mask>` becomes k = `states` consecutive states; padding moves to the right.

    With `anchors` the first and the last token of a sequence with masks are expanded too. A sequence without masks
    stays as it is. Returns input_ids, attention_mask, position_ids, clone_ids [B, E]; first [B, L]: index in E of each
    token; targets [B, L] bool: the expanded positions.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    attended = attention_mask.bool()
    targets = (input_ids == mask_token_id) & attended
    index = attended.long().cumsum(1) - 1
    if anchors:
        ends = attended & ((index == 0) | (index == index[:, -1:]))
        targets = targets | (ends & targets.any(1, keepdim=True))
    copies = attended.long() + (states - 1) * targets.long()
    after = copies.cumsum(1)
    first = after - copies
    longest = max(1, int(after[:, -1].max()))
    slots = torch.arange(longest, device=input_ids.device).expand(len(input_ids), -1).contiguous()
    source = torch.searchsorted(after, slots, right=True).clamp(max=input_ids.shape[1] - 1)
    inside = slots < after[:, -1:]
    clone = (slots - first.gather(1, source) + 1) * targets.gather(1, source)
    return {
        "input_ids": input_ids.gather(1, source),
        "attention_mask": inside.long(),
        "position_ids": (index.gather(1, source)).clamp(min=0) * inside,
        "clone_ids": clone * inside,
        "first": first,
        "targets": targets,
    }


def jump_prior(config: ExLMConfig, num_states: int, device: torch.device) -> Tensor:
    """What is added to the score of going from state v to u, [S, S]: by how far a jump is from k states ("gaussian",
    "laplace") or from the next group of k ("group")."""
    index, expected = torch.arange(num_states, device=device), config.states
    if config.jump_prior == "group":
        index, expected = index // config.states, 1
    surplus = (index - index[:, None] - expected).float() / config.jump_width
    fall = surplus**2 / 2 if config.jump_prior == "gaussian" else surplus.abs()
    return -fall.clamp(max=config.jump_floor)


class ExLMTransitionHead(nn.Module):
    """log E [B, S, S], E[v, u] = sum_h softmax(gate_v)_h softmax_u(q_hv . k_hu / sqrt(P) + c_vu) over the allowed u.

    c is the prior over jumps, if there is one.
    """

    def __init__(self, config: ExLMConfig):
        super().__init__()
        inputs = config.hidden_size * (2 if config.transition_positions else 1)
        self.positions = None
        if config.transition_positions:
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.query = nn.Linear(inputs, config.hidden_size)
        self.key = nn.Linear(inputs, config.hidden_size)
        self.gate = nn.Linear(inputs, config.num_attention_heads)
        self.heads = config.num_attention_heads
        self.config = config

    def forward(self, features: Tensor, index: Tensor, allowed: Tensor) -> Tensor:
        """features [B, S, D] of the states, index [B, S] in the expanded sequence, allowed [B, S, S] bool."""
        if self.positions is not None:
            if int(index.max()) >= self.positions.num_embeddings:
                raise ValueError(
                    f"expanded length {int(index.max()) + 1} exceeds max_position_embeddings = "
                    f"{self.positions.num_embeddings}: use shorter sequences or fewer masks"
                )
            features = torch.cat([features, self.positions(index)], -1)
        query, key = (layer(features).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key))
        scores = torch.einsum("bvhp,buhp->bhvu", query, key).float() * query.shape[-1] ** -0.5
        if self.config.jump_prior != "none":
            scores = scores + jump_prior(self.config, scores.shape[-1], scores.device)
        log_heads = scores.masked_fill(~allowed[:, None], NEVER).log_softmax(-1)
        log_gate = self.gate(features).float().log_softmax(-1).transpose(1, 2)[..., None]
        return (log_heads + log_gate).logsumexp(1).masked_fill(~allowed, NEVER)


def uniform_transitions(allowed: Tensor) -> Tensor:
    """log E [B, S, S] where each allowed transition of a state is equally probable; allowed [B, S, S] bool."""
    log_e = -allowed.sum(-1, keepdim=True).clamp(min=1).float().log()
    return log_e.expand(allowed.shape).masked_fill(~allowed, NEVER)


def path_marginals(log_transitions: Tensor, num_targets: Tensor, num_states: Tensor, ends: int) -> Tensor:
    """q [B, N, S]: probability by the transitions alone that a path of N states has its i-th at state u.

    log_transitions [B, S, S]; num_targets, num_states [B] of each sequence; a path starts at one of the first and ends
    at one of the last `ends` states. Rows past the end of a sequence are 0.
    """
    edges = log_transitions if log_transitions.device.type == "mps" else log_transitions.double()
    index = torch.arange(edges.shape[1], device=edges.device)
    stop, last = num_states[:, None], num_targets[:, None] - 1
    row = torch.where(index < ends, 0.0, NEVER).to(edges.dtype).expand(len(edges), -1)
    forward = [row]
    for _ in range(1, int(num_targets.max())):
        row = (row[:, :, None] + edges).logsumexp(1).clamp(min=NEVER)
        forward.append(row)
    final = torch.where((index < stop) & (index >= stop - ends), 0.0, NEVER).to(edges.dtype)
    row, backward = final, []
    for i in range(len(forward) - 1, -1, -1):
        arriving = (edges + row[:, None]).logsumexp(2).clamp(min=NEVER)
        row = torch.where(i < last, arriving, final)
        backward.append(row)
    joint = torch.stack(forward, 1) + torch.stack(backward[::-1], 1)
    inside = torch.arange(len(forward), device=edges.device) < num_targets[:, None]
    return joint.softmax(-1) * inside[:, :, None]
