"""Programs for the layers of a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..attend import Attend
from ..masks import Mask
from ..programs import Program
from ..wrapping.data import check_names, names_of, put_forward
from ..wrapping.layers import Choice, Layer, check_choice, programs_of, sees_later
from ..wrapping.sites import Site, put_sites
from . import NAME
from .visible import PACKED, PADDING, Visible, joined_with


class LayerSite(Site):
    """An attention layer of transformers.

    heads: the layer's query heads.
    model: the name of the model's class.
    names: of the data that the model's programs read; this one may read fewer.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        program: Program | None,
        heads: int,
        model: str,
        names: tuple[str, ...],
    ) -> None:
        super().__init__(path, kind, program)
        self._model, self._names = model, names
        self._attends: dict[tuple[str, ...], Attend] = {}
        self._sees_later = False
        if program is None:
            return
        self._sees_later = sees_later(program, heads)
        # Created in advance: none may be created in a trace.
        for joined in ((), (PADDING,), (PACKED,), (PADDING, PACKED)):
            self._attends[joined] = Attend(joined_with(program, joined))

    def check(self, visible: Visible) -> None:
        """Check that the layer's program fits a call.

        Raises ValueError or NotImplementedError for a call that it does not fit.
        """
        if visible.causal and self._sees_later:
            raise ValueError(
                f"the mask of {self.path} is causal, and its program shows later keys to queries. "
                "Write masks.causal() & ..., or causal=True in a program that takes it"
            )
        if visible.merged:
            raise NotImplementedError(
                f"in a graph of torch.compile the packed sequences of {self.path} and its chunks "
                "are one mask, of which a program would replace the chunks alone. "
                "Pass attention_mask of shape (batch, tokens), or call the model eagerly"
            )
        if visible.cut:
            raise ValueError(
                f"the sliding cache of {self.path} has dropped keys that its program counts. "
                "Pass use_cache=False, or build the model without sliding layers "
                "(sliding_window=None, layer_types of 'full_attention')"
            )

    def check_data(self, data: Mapping[str, Tensor] | None, query: Tensor, key: Tensor) -> None:
        """Check that a call's data reached the layer.

        Raises ValueError otherwise, and for data of fewer tokens than a cache.
        """
        read = () if self.program is None else self.program.names
        if data is None:
            if read:
                raise ValueError(
                    f"the data {', '.join(read)} did not reach {self.path}: {self._model} does not "
                    "hand on keywords (**kwargs) to this layer, or a part of it was called. Call "
                    "the wrapped model itself; where it drops keywords use programs without data"
                )
            return
        check_names(self._model, self._names, data)
        for name in read:
            self._check_tensor(name, data[name], query, key)

    def _check_tensor(self, name: str, x: object, query: Tensor, key: Tensor) -> None:
        """Raise ValueError for data that generate() would have to extend."""
        if not isinstance(x, Tensor) or x.dim() != 2:
            return  # refused with the checks of every call
        batch, tokens = key.shape[0], key.shape[2]
        if x.shape[1] < tokens and query.shape[2] < tokens:
            raise ValueError(
                f"data[{name!r}] has {x.shape[1]} tokens, and the cache of {self.path} {tokens}. "
                "generate() passes the same data at every step: pass that of the prompt and of "
                "all new tokens, (batch or 1, prompt + max_new_tokens)"
            )
        if x.shape[0] not in (1, batch) and batch % x.shape[0] == 0:
            raise ValueError(
                f"data[{name!r}] has {x.shape[0]} rows, and {self.path} a batch of {batch}. "
                "For beams and num_return_sequences of generate(), which does not repeat data, "
                f"pass x.repeat_interleave({batch // x.shape[0]}, 0)"
            )

    def attend(self, joined: tuple[str, ...]) -> Attend:
        """Attention by the layer's own program under data of a call.

        joined: sorted names of the data.
        """
        return self._attends[joined]


def wrap(model: Any, attention: Choice = None) -> Any:
    """The model with this library's attention, in place.

    attention: a program or mask for all layers; a function of a `Layer`; or {pattern of paths:
        program}, as {"*.layers.0.*": program}, of which the first match counts. None, or None for
        a layer: the model's own masks stay. A program replaces the model's structure (causal,
        windows, chunks) and is joined with a call's data (padding, packed sequences). Data that
        programs read by name is passed in a call, as model(input_ids, data={name: tensor}).

    Raises ValueError if there is no layer, a pattern matches none, a program shows later keys to a
    causal layer, or reads data that the model's forward cannot hand on.
    """
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not take its attention from transformers' "
            "AttentionInterface. Rewrite it to, or wrap its inner layers"
        )
    check_choice(attention)
    modules = {path: module for path, module in model.named_modules() if _is_attention(module)}
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no attention layer that calls transformers' "
            f"AttentionInterface: build it with attn_implementation={NAME!r} where the model's "
            "own masks will do"
        )
    layers = {path: _layer_of(path, module, model) for path, module in modules.items()}
    _check_cross_attention(model, attention, layers)
    programs = programs_of(attention, layers)
    names = names_of(programs.values())
    _check_names(names)
    sites = {}
    for path, layer in layers.items():
        heads = layer.heads or 1
        sites[path] = LayerSite(
            path, layer.kind, programs[path], heads, type(model).__name__, names
        )
    # Nothing is changed before all of it is known to fit.
    put_forward(model, names)
    model.set_attn_implementation(NAME)
    for path, module in modules.items():
        put_sites(module, [sites[path]])
    return model


def _check_names(names: tuple[str, ...]) -> None:
    """Raise ValueError for names that a call's own data have."""
    for name in names:
        if name in (PADDING, PACKED):
            raise ValueError(
                f"a program reads the data {name!r}, which is an argument of the model and joins "
                "programs by itself. Leave it out of the program, or choose another name"
            )


def _check_cross_attention(model: Any, attention: Choice, layers: Mapping[str, Layer]) -> None:
    """Raise ValueError for one program for self and cross attention."""
    crosses = getattr(model.config, "is_encoder_decoder", False) or any(
        "Cross" in layer.kind for layer in layers.values()
    )
    if isinstance(attention, (Program, Mask)) and crosses:
        raise ValueError(
            f"one program for all layers of {type(model).__name__} would be that of its cross "
            "attention too. Name the layers: {pattern: program}. "
            f"They are {', '.join(layers)}"
        )


def _is_attention(module: nn.Module) -> bool:
    kind = type(module)
    return "Attention" in kind.__name__ and (hasattr(module, "is_causal") or _calls_interface(kind))


def _calls_interface(kind: type[nn.Module]) -> bool:
    """Whether a class looks up its attention by name.

    Cross attention without is_causal does.
    """
    forward: Any = inspect.unwrap(kind.forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _layer_of(path: str, module: nn.Module, model: Any) -> Layer:
    config = getattr(module, "config", model.config)
    index = getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    layer_type = None
    if types and index is not None:
        layer_type = types[index]
    heads = getattr(config, "num_attention_heads", None)
    return Layer(
        path,
        type(module).__name__,
        index,
        causal=bool(getattr(module, "is_causal", False)),
        layer_type=layer_type,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", heads),
        head_dim=getattr(module, "head_dim", None),
    )
