"""A nanoSteel model in transformers. `python -m extras.export` copies this file and model.py beside the weights.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Needs torch and transformers, and model.py in the same folder.
"""

from dataclasses import fields

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .model import Config, Decoder


class NanoSteelConfig(PretrainedConfig):
    """The fields of model.Config, under these names; transformers' names for some of them work too."""

    model_type = "nanosteel"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **values):
        own = {field.name: values.pop(field.name, field.default) for field in fields(Config)}
        values.pop("tie_word_embeddings", None)  # the same as tie_embeddings
        super().__init__(tie_word_embeddings=own["tie_embeddings"], **values)
        for name, value in own.items():
            setattr(self, name, value)

    def of_model(self):
        return Config(**{field.name: getattr(self, field.name) for field in fields(Config)})


class NanoSteelCache:
    """model.Cache, made larger as it fills. Rows can be reordered, as beam search does."""

    is_compileable = False

    def __init__(self, decoder, batch, max_len):
        self.decoder, self.inner = decoder, decoder.new_cache(batch, max_len)

    def get_seq_length(self, layer_idx=0):
        return self.inner.length

    def reserve(self, length):
        """Make room for `length` positions."""
        if length <= self.inner.max_len:
            return
        old, new = self.inner, self.decoder.new_cache(len(self.inner.start), max(length, 2 * self.inner.max_len))
        for stored, larger in zip((*old.k, *old.v), (*new.k, *new.v)):
            larger[:, :, : old.length] = stored[:, :, : old.length]
        new.length, new.start, new.bounded, new.recent = old.length, old.start, old.bounded, old.recent
        self.inner = new

    def reorder_cache(self, beam_idx):
        """Row i becomes what row beam_idx[i] was."""
        inner = self.inner
        inner.k, inner.v = ([rows[beam_idx] for rows in layers] for layers in (inner.k, inner.v))
        inner.recent = [[rows[beam_idx] for rows in layer] for layer in inner.recent]
        inner.start = inner.start[beam_idx]


class Table(torch.nn.Module):
    """A matrix [vocabulary, width] of the decoder, in the form in which other programs ask for it."""

    bias = None

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


class NanoSteelPreTrainedModel(PreTrainedModel):
    config_class = NanoSteelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    gradient_checkpointing = False

    def _init_weights(self, module):
        pass  # Decoder has done it

    def _set_gradient_checkpointing(self, enable=True, **_):
        self.gradient_checkpointing = enable
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = enable


class NanoSteelModel(NanoSteelPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = Decoder(config.of_model())
        self.post_init()

    def get_input_embeddings(self):
        return Table(self.decoder.embedding)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **_):
        """input_ids [B, T] -> normed states of the last layer [B, T, D], and the cache.

        attention_mask [B, what the cache holds + T] may be 0 on the left of a text, or on its right, where it changes
        nothing.
        """
        (B, T), ids, cache = input_ids.shape, input_ids, past_key_values
        is_padded = False
        if attention_mask is not None and (cache is None or cache.get_seq_length() == 0):
            mask = attention_mask.bool()
            is_padded = not mask[:, 0].all()
            if (mask[:, 1:] != mask[:, :-1]).sum(1).gt(1).any():
                raise ValueError("attention_mask: expected zeros on one side of each text alone")
            if is_padded and not self.decoder.has_cache:
                raise ValueError('dispatch = "sequence" reads padding too: give it texts of one length')
            ids = ids.masked_fill(~mask, -1) if is_padded else ids
        if cache is None and self.decoder.has_cache and (is_padded or use_cache and not self.training):
            cache = NanoSteelCache(self.decoder, B, T + 64 if use_cache else T)
        if cache is not None:
            cache.reserve(cache.get_seq_length() + T)
        hidden = self.decoder.hidden_states(ids, None if cache is None else cache.inner)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache if use_cache else None)


class NanoSteelForCausalLM(NanoSteelPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = NanoSteelModel(config)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def get_output_embeddings(self):
        return Table(self.model.decoder.head_weight)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """input_ids [B, T] -> logits [B, T, V], and with labels [B, T] (-100: not counted) the loss of transformers.

        logits_to_keep: of how many of the last positions; 0: of all. The other arguments: of NanoSteelModel.
        """
        outputs = self.model(input_ids, attention_mask, past_key_values, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = F.linear(outputs.last_hidden_state[:, kept], self.model.decoder.head_weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values, "logits_to_keep": 1}
        return inputs | {"attention_mask": attention_mask, "use_cache": kwargs.get("use_cache", True)}
