"""A chain as a language model of transformers: what `generate` and evaluation harnesses call.

This module needs the extra ``[transformers]``; nothing else of the package does.
"""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F

from resnet_paths._utils.errors import ResnetPathsError, requires_extra
from resnet_paths.core.chain import ResidualChain, require_chain
from resnet_paths.core.input_sizes import CheckedInputs
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.signature import Signature

with requires_extra("transformers"):
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

__all__ = ["ChainForCausalLM", "as_causal_lm"]

_READ = ("input_ids", "attention_mask", "position_ids")


def as_causal_lm(chain: ResidualChain, config: PretrainedConfig) -> ChainForCausalLM:
    """A causal language model of transformers that computes what a chain computes, such as a lesioned one.

    It has ``generate`` and can be handed to code that takes a `transformers.PreTrainedModel`, such as evaluation
    harnesses. It shares the weights of the chain. There is no cache of keys and values: each new token costs a forward
    pass over the whole sequence.

    Args:
        chain: A chain in eval mode, unraveled from a causal language model with ``input_ids``, and with
            ``attention_mask`` if sequences are to be padded. With padding on the left, absolute positions are right
            only if ``position_ids`` are among the example inputs too; they are counted from the first real token.
        config: Configuration of the model: ``model.config``. It is copied.

    Returns:
        The model. Called with ``input_ids`` [batch, position] it returns ``logits`` [batch, position, vocabulary], and
        with ``labels`` the loss of the next token.

    Raises:
        ResnetPathsError: If the chain is in training mode or reads other inputs.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from resnet_paths import delete_block, unravel
        >>> config = GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> chain = unravel(GPT2LMHeadModel(config).eval(), {"input_ids": tokens, "use_cache": False})
        >>> lesioned = as_causal_lm(delete_block(chain, "transformer.h.1.mlp"), config)
        >>> lesioned.generate(tokens, max_new_tokens=5, min_new_tokens=5).shape
        torch.Size([2, 8])
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    signature = chain.stem.signature if isinstance(chain.stem, CheckedInputs) else None
    names = _names(signature)
    unknown = [name for name in names if name not in _READ]
    if unknown or "input_ids" not in names:
        raise ResnetPathsError(
            "chain",
            f"a chain that reads {', '.join(names)}",
            "a chain of a causal language model that reads input_ids, and perhaps attention_mask and position_ids",
            "Unravel the model with such example inputs.",
        )
    return ChainForCausalLM(config, chain, signature)


def _names(signature: Signature | None) -> list[str]:
    """What a chain is called with; a single tensor without a name is the tokens."""
    names = ["argument 0"] if signature is None else signature.names
    return ["input_ids" if name == "argument 0" else name for name in names]


class ChainForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A chain as a causal language model; made by `as_causal_lm`.

    Args:
        config: Configuration of the model that the chain was unraveled from.
        chain: The chain.
        signature: How the chain is called; None for tokens alone.
    """

    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PretrainedConfig, chain: ResidualChain, signature: Signature | None) -> None:
        config = copy.deepcopy(config)
        config.use_cache = False
        super().__init__(config)
        self.chain = chain
        self.signature = signature
        self.generation_config.use_cache = False
        self.training = False

    def tie_weights(self, *_: object, **__: object) -> None:
        """Nothing: the chain's parts share what the model's parts share."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: object) -> dict[str, object]:
        """The whole sequence at each step; `generate` reads the name of `kwargs`."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **_: object,
    ) -> CausalLMOutput:
        """Logits of the next token at each position.

        Args:
            input_ids: Tokens [batch, position].
            attention_mask: 0 at padding [batch, position]; None for none.
            position_ids: Position of each token [batch, position]; None to count real tokens.
            labels: Tokens to predict, as a rule the input's own, -100 where none is; None for no loss.
            **_: Options of transformers that do not change logits, such as ``use_cache``.

        Returns:
            ``logits`` [batch, position, vocabulary], and ``loss`` with labels.

        Raises:
            ResnetPathsError: If there is padding and the chain reads no attention mask, or the chain does not return
                logits of the configuration's vocabulary.
        """
        names = _names(self.signature)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if "attention_mask" not in names and not bool(mask.all()):
            raise ResnetPathsError(
                "attention_mask",
                "a mask with zeros",
                "no padding for a chain that reads no attention mask",
                "Unravel the model with attention_mask among the example inputs.",
            )
        positions = (mask.long().cumsum(1) - 1).clamp(min=0) if position_ids is None else position_ids
        given = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        length = input_ids.shape[1]
        if length == 1:  # exported graphs take two positions or more; later ones are not attended to
            given = {name: F.pad(value, (0, 1), value=1) for name, value in given.items()}
        tensors = [given[name] for name in names]
        args, kwargs = (tuple(tensors), {}) if self.signature is None else self.signature.arguments(tensors)
        logits = self.chain(*args, **kwargs)[:, :length]
        if logits.dim() != 3 or logits.shape[2] != self.config.vocab_size:
            raise ResnetPathsError(
                "chain",
                f"a chain that returns {list(logits.shape)}",
                f"logits [batch, position, {self.config.vocab_size}], as in the configuration",
            )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
