"""Configuration of ExLM and of its plain twin, a masked language model with 2-D rotary positions."""

from transformers import PreTrainedConfig


class ExLMConfig(PreTrainedConfig):
    """Sizes and switches of the architecture (ExLM: arXiv 2501.13397).

    objective: "exlm" (`states` hidden states for each `<mask>`, joined by a graph) or "mlm" (one state, no graph).
    transitions: "dense", "sparse" or "uniform"; transition_positions: the transition head knows where its states are.
    jump_prior: "none", or what is added to the scores of transitions by their length: "gaussian", "laplace" or "group",
    of width jump_width, and at least -jump_floor.
    anchors: first and last token of a sequence with masks are expanded too. rotary: "2d" or "1d"; norm: "pre" or
    "post". max_position_embeddings: longest expanded sequence that the transition head can index.
    """

    model_type = "exlm"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        objective: str = "exlm",
        states: int = 4,
        transitions: str = "dense",
        jump_prior: str = "none",
        jump_width: float = 0.0,
        jump_floor: float = 0.0,
        transition_positions: bool = True,
        anchors: bool = True,
        rotary: str = "2d",
        norm: str = "pre",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        bos_token_id: int = 0,
        pad_token_id: int = 1,
        eos_token_id: int = 2,
        mask_token_id: int = 4,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.objective = objective
        self.states = states
        self.transitions = transitions
        self.jump_prior = jump_prior
        self.jump_width = jump_width
        self.jump_floor = jump_floor
        self.transition_positions = transition_positions
        self.anchors = anchors
        self.rotary = rotary
        self.norm = norm
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.bos_token_id = bos_token_id
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id
        self.mask_token_id = mask_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
