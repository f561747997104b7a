"""ExLM (arXiv 2501.13397) for the transformers library; needs torch and transformers alone.

B sequences, L tokens, E tokens after the expansion of masks, D width, H heads, P head width, N expanded positions
(targets) of a sequence, S = k N states, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .configuration_exlm import ExLMConfig
from .graph_exlm import NEVER, ExLMTransitionHead, expand_masks, path_marginals, uniform_transitions

ROTARY_BASE = 10000.0


def rotary_angles(position: Tensor, clone: Tensor, width: int, kind: str) -> Tensor:
    """Angles [B, E, P/2]: "2d" rotates half of each head by the position, half by the clone index; "1d" all of it by
    the index in the (expanded) sequence, which the caller passes as `position`."""
    size = width if kind == "1d" else width // 2
    exponent = torch.arange(0, size, 2, dtype=torch.int64, device=position.device).cpu().double() / size
    frequencies = (ROTARY_BASE**-exponent).float().to(position.device)
    angles = position.float()[..., None] * frequencies
    return angles if kind == "1d" else torch.cat([angles, clone.float()[..., None] * frequencies], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, E, P] rotated; cos and sin [B, 1, E, P/2]."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


class ExLMAttention(nn.Module):
    """Self-attention; the rows of `qkv` are ordered [H, 3, P]."""

    def __init__(self, config: ExLMConfig):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, hidden: Tensor, visible: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden [B, E, D]; visible [B, 1, 1, E] bool or None -> [B, E, D]."""
        q, k, v = self.qkv(hidden).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2).unbind(3)
        q, k = (rotate(x, cos.to(x.dtype), sin.to(x.dtype)) for x in (q, k))
        probability = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=probability)
        return self.out(mixed.transpose(1, 2).flatten(2))


class ExLMFeedForward(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: ExLMConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden)))


class ExLMBlock(GradientCheckpointingLayer):
    """Attention and feed-forward with residuals; LayerNorm before each ("pre") or after each sum ("post")."""

    def __init__(self, config: ExLMConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ExLMAttention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = ExLMFeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.pre_norm = config.norm == "pre"

    def forward(self, hidden: Tensor, visible: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        if self.pre_norm:
            hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), visible, cos, sin))
            return hidden + self.dropout(self.ffn(self.ffn_norm(hidden)))
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, visible, cos, sin)))
        return self.ffn_norm(hidden + self.dropout(self.ffn(hidden)))


class ExLMPreTrainedModel(PreTrainedModel):
    """What all models here have in common."""

    config_class = ExLMConfig
    base_model_prefix = "exlm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ExLMBlock"]
    _supports_sdpa = True


class ExLMModel(ExLMPreTrainedModel):
    """The encoder. It expands nothing: a token is one state, with clone index 0 unless `clone_ids` says otherwise."""

    def __init__(self, config: ExLMConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.blocks = nn.ModuleList(ExLMBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        clone_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """input_ids [B, L] or inputs_embeds [B, L, D]; attention_mask [B, L] (1: token, 0: padding, on either side).

        position_ids: index in the unexpanded sequence (default: number of tokens before). clone_ids: 0, or 1..k for
        the states of an expanded position. hidden_states: the embeddings, then the output of each block; the last one
        before the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        index = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        if position_ids is None or self.config.rotary == "1d":
            position_ids = index
        clone_ids = torch.zeros_like(index) if clone_ids is None else clone_ids
        width = self.config.hidden_size // self.config.num_attention_heads
        angles = rotary_angles(position_ids, clone_ids, width, self.config.rotary)[:, None]
        cos, sin = angles.cos(), angles.sin()
        visible = attention_mask.bool()[:, None, None]
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden = self.dropout(hidden)
        collected = [hidden]
        for block in self.blocks:
            hidden = block(hidden, visible, cos, sin)
            collected.append(hidden)
        out = BaseModelOutput(self.norm(hidden), hidden_states=tuple(collected) if wanted else None)
        return _returned(self.config, out, return_dict)


class ExLMOutput(nn.Module):
    """Token head (dense, gelu, norm, vocabulary), and the transition head where transitions are learned."""

    def __init__(self, config: ExLMConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.transition = None
        if config.objective == "exlm" and config.transitions != "uniform":
            self.transition = ExLMTransitionHead(config)
        self.group = config.states if config.transitions == "sparse" else None
        self.ends = 1 if config.anchors else config.states
        self.states = config.states

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the vocabulary."""
        return self.decoder(self.norm(F.gelu(self.dense(hidden))))

    def mixtures(self, hidden: Tensor, clone_ids: Tensor, num_targets: Tensor) -> Tensor:
        """log p_i(w) = log sum_u q_i(u) p_u(w) of each target, [B, N, V]; hidden [B, E, D], clone_ids [B, E]."""
        num_states = self.states * num_targets
        order = (clone_ids == 0).long().argsort(dim=1, stable=True)[:, : int(num_states.max())]
        features = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        index = torch.arange(order.shape[1], device=hidden.device)
        allowed = index[:, None] < index
        if self.group is not None:
            allowed = index[:, None] // self.group + 1 == index // self.group
        own = index < num_states[:, None]
        allowed = allowed & own[:, :, None] & own[:, None]
        if self.transition is None:
            edges = uniform_transitions(allowed)
        else:
            edges = self.transition(features, order * own, allowed)
        q = path_marginals(edges, num_targets, num_states, self.ends)
        log_p = self(features).float().log_softmax(-1)
        top = log_p.detach().masked_fill(~own[..., None], NEVER).amax(1, keepdim=True)
        sums = q.to(log_p.dtype) @ (log_p - top).masked_fill(~own[..., None], NEVER).exp()
        return sums.clamp(min=torch.finfo(sums.dtype).tiny).log() + top


class ExLMForMaskedLM(ExLMPreTrainedModel):
    """Predicts each `<mask>` by its mixture over the states of all paths; other positions by their hidden state."""

    _tied_weights_keys = {"output.decoder.weight": "exlm.embedding.weight"}

    def __init__(self, config: ExLMConfig):
        super().__init__(config)
        self.exlm = ExLMModel(config)
        self.output = ExLMOutput(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.output.decoder = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """logits [B, L, V]; at expanded positions they are log-probabilities. hidden_states: of the expanded sequence.

        labels [B, L], -100 is ignored: the loss is the mean cross-entropy, position by position. It is meant for
        fine-tuning, and is not the likelihood of the pretraining, which sums over the paths that spell all targets.
        """
        config = self.config
        expanded = expand_masks(input_ids, attention_mask, config.mask_token_id, config.states, config.anchors)
        first, targets = expanded.pop("first"), expanded.pop("targets")
        out = self.exlm(**expanded, output_hidden_states=output_hidden_states, return_dict=True)
        hidden = out.last_hidden_state
        first = first.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        logits = self.output(hidden.gather(1, first)).float()
        if bool(targets.any()):
            if config.objective == "mlm":
                mixtures = logits[targets].log_softmax(-1)
            else:
                num_targets = targets.sum(1)
                padded = self.output.mixtures(hidden, expanded["clone_ids"], num_targets)
                rank = torch.arange(padded.shape[1], device=padded.device)
                mixtures = padded[rank < num_targets[:, None]]
            logits = logits.masked_scatter(targets[..., None], mixtures)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return _returned(config, MaskedLMOutput(loss, logits, out.hidden_states), return_dict)


class ExLMClassificationHead(nn.Module):
    """dropout, dense, tanh, dropout, projection."""

    def __init__(self, config: ExLMConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.projection = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(self.dropout(torch.tanh(self.dense(self.dropout(features)))))


class ExLMForSequenceClassification(ExLMPreTrainedModel):
    """Classification or regression from the first token; `problem_type` as elsewhere in transformers."""

    def __init__(self, config: ExLMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.exlm = ExLMModel(config)
        self.classifier = ExLMClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """logits [B, num_labels]; labels [B], or [B, num_labels] for several labels or values."""
        out = self.exlm(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = out.last_hidden_state
        start = hidden.new_zeros(len(hidden), dtype=torch.int64)
        if attention_mask is not None:
            start = attention_mask.long().argmax(1)
        logits = self.classifier(hidden[torch.arange(len(hidden), device=hidden.device), start])
        loss = None if labels is None else self._loss(logits, labels)
        return _returned(self.config, SequenceClassifierOutput(loss, logits, out.hidden_states), return_dict)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type is None:
            integer = labels.dtype in (torch.int32, torch.int64)
            several = "single_label_classification" if integer else "multi_label_classification"
            self.config.problem_type = "regression" if self.num_labels == 1 else several
        if self.config.problem_type == "regression":
            return F.mse_loss(logits.float().squeeze(-1), labels.float().view(logits.squeeze(-1).shape))
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(logits.float(), labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


class ExLMForTokenClassification(ExLMPreTrainedModel):
    """A label for each token."""

    def __init__(self, config: ExLMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.exlm = ExLMModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple:
        """logits [B, L, num_labels]; labels [B, L], -100 is ignored."""
        out = self.exlm(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return _returned(self.config, TokenClassifierOutput(loss, logits, out.hidden_states), return_dict)


class ExLMForQuestionAnswering(ExLMPreTrainedModel):
    """Start and end of the answer in the text."""

    def __init__(self, config: ExLMConfig):
        super().__init__(config)
        self.exlm = ExLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple:
        """start_logits, end_logits [B, L]; positions [B], those outside the sequence are ignored."""
        out = self.exlm(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        start, end = self.qa_outputs(out.last_hidden_state).float().unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            length = start.shape[1]
            wanted = [positions.view(-1).clamp(0, length) for positions in (start_positions, end_positions)]
            losses = [F.cross_entropy(x, y, ignore_index=length) for x, y in zip((start, end), wanted)]
            loss = sum(losses) / 2
        return _returned(self.config, QuestionAnsweringModelOutput(loss, start, end, out.hidden_states), return_dict)


def _classifier_dropout(config: ExLMConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _returned(config: ExLMConfig, out, return_dict: bool | None):
    """The output object, or a tuple where that is wanted."""
    wanted = config.return_dict if return_dict is None else return_dict
    return out if wanted else out.to_tuple()
