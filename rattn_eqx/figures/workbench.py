"""A head at work: pairs, weights and numbers of random vectors or of a model's heads, under controls, for notebooks.

Needs ipywidgets, plotly and anywidget: the extra `notebooks`.
"""

import dataclasses
import html
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from pallas.feature_map import FeatureMap, Hedgehog, named
from rattn_eqx.data.tokenizers import Tokenizer
from rattn_eqx.evaluation.heads import Head, attention_inputs, read_head
from rattn_eqx.figures import controls, pair_map
from rattn_eqx.figures.controls import OF_TEXT, RANDOM
from rattn_eqx.figures.exports import figure, write
from rattn_eqx.figures.live_map import LiveMap, Side
from rattn_eqx.figures.names import shown
from rattn_eqx.figures.training_panel import TrainingPanel
from rattn_eqx.figures.words import in_words, remarks
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.model.map_files import is_place, map_of, read_map
from rattn_eqx.weights.load import load

GIVEN, OWN = "the model given", "the model's own"


@dataclasses.dataclass(frozen=True)
class _Map:
    """A map that is offered. config: its name in a `ModelConfig`, None if it has none."""

    of_size: Callable[[int], FeatureMap]
    config: str | None


def _control(name: str) -> Any:
    return property(lambda self: self.controls[name].value, lambda self, value: self.set(**{name: value}))


class Workbench:
    """Controls over one head, or two beside each other, and a picture that follows at once.

    Every control is an attribute: `workbench.window = 8` draws, as moving the slider does; `set` changes several and
    draws once. What goes wrong, in a map of your own for example, is said beside the picture, and the last one stays.

    Args of the constructor:
      source: "random vectors"; what `rattn_eqx.load` takes; or a `LanguageModel`, with its `tokenizer`.
      maps: maps of your own beside the named ones: callables by name, or places "FILE.py:NAME".
      tokenizer: of a `LanguageModel`.
      settings: any of the attributes below.

    Attributes:
      source: as above; of a `LanguageModel`, "the model given".
      text: what a model reads, behind its document marker.
      layer, head: of the model, from 0.
      length: tokens of random vectors; of a text at most so many from its beginning.
      head_size, seed: of random vectors.
      scale: what queries and keys of both branches are multiplied by.
      feature_map: the name of a map.
      window: W, the keys that a query sees, its own included.
      query: the token whose row is drawn, from 0.
      view: "bars" or "arcs", of that row.
      compare: whether B is drawn beside A, with `other_map`, `other_layer` and `other_head`.
      error: what went wrong in the last change, or None. sentences: what else is to be said of the picture.
      sides: the `Side`s that are drawn, with their numbers.
      training: the `TrainingPanel` behind "Train this map".

    Raises:
      ValueError: a setting that there is not, or a value that it cannot have.
    """

    source, text, layer, head = map(_control, ("source", "text", "layer", "head"))
    length, head_size, scale, seed = map(_control, ("length", "head_size", "scale", "seed"))
    feature_map, window, query, view = map(_control, ("feature_map", "window", "query", "view"))
    compare, other_map = _control("compare"), _control("other_map")
    other_layer, other_head = _control("other_layer"), _control("other_head")

    def __init__(
        self,
        source: LanguageModel | Path | str = RANDOM,
        maps: Mapping[str, FeatureMap | str] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        **settings: Any,
    ):
        self.error: str | None = None
        self.sentences: list[str] = []
        self.sides: list[Side] = []
        self._maps = {name: _Map(lambda d, phi=phi: phi, name) for name, phi in named.items()}
        self._maps["Hedgehog"] = _Map(lambda d: Hedgehog(d, key=jax.random.key(0)), "learned")
        self._added: dict[str, str] = {}  # what stands in a line of Python for the maps that were added
        self._given = (source, tokenizer) if isinstance(source, LanguageModel) else None
        self._model: LanguageModel | None = None
        self._tokenizer: Tokenizer | None = None
        self._drawn = 64  # tokens
        self._kept: dict[Any, Any] = {}  # streams, heads, maps and pairs that were computed
        self._quiet = True  # while controls are changed by program
        self._build(_ipywidgets())
        for name, feature_map in (maps or {}).items():
            self._add(name, feature_map)
        self._read_source(GIVEN if self._given else str(source))
        self._offer_maps()
        self._quiet = False
        self.set(**settings)

    def set(self, **settings: Any) -> None:
        """Change several controls, and draw once.

        Raises:
          ValueError: a setting that there is not, or a value that it cannot have.
        """
        if unknown := settings.keys() - self.controls.keys():
            raise ValueError(f"Workbench: no setting {', '.join(unknown)}; the settings are {', '.join(self.controls)}")
        self._quiet = True
        try:
            if "source" in settings:
                self._read_source(settings.pop("source"))
            for name, value in settings.items():
                self._change(name, value)
        finally:
            self._quiet = False
        self._draw(follow="query" not in settings)

    def add(self, name: str, feature_map: FeatureMap | str | None = None) -> None:
        """Offer a map under this name, in place of an earlier one of that name, and draw it.

        Args:
          feature_map: a callable (..., d) -> (..., f), a pair of them, or a place "FILE.py:NAME", which is the name too
            where it is left out.

        Raises:
          ValueError: as `map_files.read_map`; the picture stays.
        """
        self._add(name, name if feature_map is None else feature_map)
        self._offer_maps()
        self.set(feature_map=name)

    def remove(self, name: str) -> None:
        """Offer a map no longer that was added.

        Raises:
          ValueError: for any other.
        """
        if name not in self._added:
            raise ValueError(f"Workbench: {name!r} was not added; maps that were: {', '.join(self._added) or 'none'}")
        del self._maps[name], self._added[name]
        self._offer_maps()
        self._draw()

    def as_python(self) -> str:
        """A line that makes this view again. Callables and a model that were given stand in it by their names."""
        names = ["feature_map", "window", "length", "scale", "query", "view"]
        names += ["head_size", "seed"] if self._model is None else ["text", "layer", "head"]
        if self.compare:
            names += ["compare", "other_map"] + ([] if self._model is None else ["other_layer", "other_head"])
        given = ["model, tokenizer=tokenizer"] if self._given and self.source == GIVEN else [repr(self.source)]
        if self._model is None:
            given = []
        used = {name: text for name, text in self._added.items() if name in (self.feature_map, self.other_map)}
        if used:
            given.append("maps={" + ", ".join(f"{name!r}: {text}" for name, text in used.items()) + "}")
        return f"Workbench({', '.join([*given, *(f'{name}={getattr(self, name)!r}' for name in names)])})"

    def figure(self) -> Figure:
        """The static figure of what is drawn, of A if there are two sides: `pair_map.draw`."""
        return figure(self.sides[0])

    def export(self, path: Path | str) -> Path:
        """Write what is drawn: .png, the static figure of each side; .csv, a row for each pair; .json, settings too.

        Raises:
          ValueError: another ending, a file that exists, or nothing drawn. OSError: as `open`.
        """
        settings = {name: control.value for name, control in self.controls.items()}
        return write(Path(path), self.sides, self._labels(), settings | {"python": self.as_python()})

    def _build(self, widgets: ModuleType) -> None:
        self.controls: dict[str, Any] = controls.make(widgets, list(self._maps))
        self.message, self.written = widgets.HTML(), widgets.HTML()
        self.line = widgets.Text(description="as Python", layout={"width": "890px"})
        self.live = LiveMap(lambda query: self.set(query=query))
        self.training = TrainingPanel(widgets, self._config)
        self.other_row = controls.row(widgets, self.controls, "other_map", "other_layer", "other_head")
        self.box = controls.arrange(widgets, self)
        for control in self.controls.values():
            control.observe(self._changed, "value")

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = self.box._repr_mimebundle_(**options)
        return bundle and bundle | {"text/plain": "the live workbench: run the notebook to see and use it"}

    def _config(self) -> str:
        """The name of the map at hand in a config."""
        name = self.feature_map
        config = self._model.config.feature_map if name == OWN and self._model else self._maps[name].config
        if config is None:
            raise ValueError(
                f"Train this map: {name} is known to this session alone, and lines of results must say what they are "
                "of; put it into a file and add it as mine.py:phi"
            )
        return config

    def _add(self, name: str, feature_map: FeatureMap | str) -> None:
        if isinstance(feature_map, str):
            if not is_place(feature_map):
                raise ValueError(f"Workbench: {feature_map!r:.80} must be a map, or a place such as mine.py:phi")
            config = read_map(feature_map, self._head_size())
            self._maps[name] = _Map(lambda d: map_of(config, d, key=jax.random.key(0)), config)
            self._added[name] = repr(feature_map)
        else:
            self._maps[name] = _Map(lambda d: feature_map, None)
            self._added[name] = getattr(feature_map, "__name__", name)
        self._kept = {key: value for key, value in self._kept.items() if name not in key}

    def _offer_maps(self) -> None:
        """The maps that may be chosen; where the one that was is gone, the first."""
        options = ([OWN] if self._own_map() else []) + list(self._maps)
        for name in ("feature_map", "other_map"):
            value = self.controls[name].value
            self._quietly(name, options=options, value=value if value in options else options[0])

    def _own_map(self) -> bool:
        model = self._model
        return model is not None and any(getattr(x.attention, "rla_gain", None) is not None for x in model.blocks)

    def _quietly(self, name: str, **traits: Any) -> None:
        """Change a control without drawing."""
        quiet, self._quiet = self._quiet, True
        for trait, value in traits.items():
            setattr(self.controls[name], trait, value)
        self._quiet = quiet

    def _change(self, name: str, value: Any) -> None:
        """Give a control a value; a slider's end goes along, and nothing else is made of it."""
        control, before = self.controls[name], self.controls[name].value
        if name in ("window", "query") and isinstance(value, int):
            control.max = max(control.max, value)
        try:
            control.value = value
        except Exception as error:  # traitlets' own
            raise ValueError(f"Workbench: {name} cannot be {value!r:.80}: {error}") from error
        if control.value != value:
            control.value = before
            raise ValueError(f"Workbench: {name} must lie between {control.min} and {control.max}; got {value!r:.80}")

    def _read_source(self, source: str) -> None:
        """Take queries and keys from there from now on, with the window and the map of the model."""
        if source == RANDOM:
            model = tokenizer = None
        elif source == GIVEN and self._given:
            model, tokenizer = self._given
        else:
            model, tokenizer, _ = load(source)
        if model is not None and tokenizer is None:
            raise ValueError(
                f"Workbench: {source} has no tokenizer; give the model and one: Workbench(model, tokenizer=...)"
            )
        other_kind = (model is None) is not (self._model is None)
        self._model, self._tokenizer = model, tokenizer
        self._kept = {}
        self._quietly("source", value=source)
        if other_kind:
            self._quietly("length", value=64 if model is None else OF_TEXT)
        self._offer_maps()
        if model is not None:
            config = model.config
            kinds = [(f"{layer} {kind.replace('_', ' ')}", layer) for layer, kind in enumerate(config.layer_kinds)]
            for beside in ("", "other_"):
                self._quietly(f"{beside}layer", options=kinds, value=0)
                self._quietly(f"{beside}head", options=list(range(config.num_heads)), value=0)
            if "local" in config.layer_kinds:
                self._quietly("window", max=max(config.window, self.controls["window"].max), value=config.window)
            if self._own_map():
                for name in ("feature_map", "other_map"):
                    self._quietly(name, value=OWN)
        for name in ("text", "layer", "head", "other_layer", "other_head"):
            self.controls[name].layout.display = "none" if model is None else ""
        for name in ("head_size", "seed"):
            self.controls[name].layout.display = "" if model is None else "none"

    def _tokens(self) -> tuple[np.ndarray, int, list[str]]:
        """The tokens of the text that are read, how many there are in all, and a label of each that is read."""

        def read() -> tuple[np.ndarray, int, list[str]]:
            assert self._tokenizer is not None
            whole = np.insert(self._tokenizer.encode(self.text.encode()).astype(np.int32), 0, self._tokenizer.document)
            tokens = whole[: self.length]
            texts = [
                self._tokenizer.decode(tokens[at : at + 1]).decode("utf-8", "replace") for at in range(len(tokens))
            ]
            return tokens, len(whole), [shown(text).replace(" ", "␣") or "¶" for text in texts]

        return self._once(("tokens", self.text, self.length), read)

    def _labels(self) -> list[str]:
        return [str(number) for number in range(self.length)] if self._model is None else self._tokens()[2]

    def _head(self, layer: int, head: int) -> Head:
        """What the head reads, before `scale`."""
        if self._model is None:
            options: dict[str, Any] = dict(length=self.length, head_size=self.head_size, seed=self.seed)
            q, k, v = self._once(("random", *options.values()), lambda: pair_map.random_head(**options))
            return Head(q, k, q, k, v, None, None, None, False)
        model, tokens = self._model, self._tokens()[0]
        streams = self._once(("streams", tokens.tobytes()), lambda: attention_inputs(model, tokens))
        return self._once(("head", tokens.tobytes(), layer, head), lambda: read_head(model, streams, layer, head))

    def _head_size(self) -> int:
        return self.head_size if self._model is None else self._model.config.head_size

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            if len(self._kept) > 64:
                self._kept = {kept: value for kept, value in self._kept.items() if kept[0] == "map"}
            self._kept[key] = make()
        return self._kept[key]

    def _side(self, name: str, layer: int, head_number: int) -> Side:
        head, d = self._head(layer, head_number), self._head_size()
        feature_map = head.feature_map if name == OWN else self._maps[name].of_size(d)
        if feature_map is None:
            raise ValueError(f"layer {layer} has no residual branch and no map of its own; choose a map")
        at = layer if name == OWN else d
        prepared = self._once(("map", name, at), lambda: pair_map.prepare(feature_map, d))
        scaled = lambda x: x * np.float32(self.scale)
        q_window, k_window, q, k = map(scaled, (head.q_window, head.k_window, head.q, head.k))
        options: dict[str, Any] = dict(q_window=q_window, k_window=k_window, sink=head.sink)
        find = lambda: pair_map.pair_map(q, k, head.v, window=self.window, feature_map=prepared, **options)
        text = "" if self._model is None else self._tokens()[0].tobytes()
        key = (text, layer, head_number, self.length, self.head_size, self.seed, self.scale, self.window)
        found = self._once(("pairs", name, *key), find)
        where = "" if self._model is None else f"layer {layer}, head {head_number}"
        return Side(name, found, where)

    def _draw(self, *, follow: bool = True) -> None:
        """follow: a query that was the last token is the last of another length too."""
        try:
            sides = [self._side(self.feature_map, self.layer, self.head)]
            if self.compare:
                sides.append(self._side(self.other_map, self.other_layer, self.other_head))
            labels = self._labels()
            if follow and self.query == self._drawn - 1:
                self._quietly("query", max=max(len(labels) - 1, self.query))
                self._quietly("query", value=len(labels) - 1)
            query = min(self.query, len(labels) - 1)
            self.live.show(sides, labels, query, self.view)
        except Exception as error:  # of a user's map too, which may raise anything
            self._fail(error)
            return
        self.error, self.sides, self._drawn = None, sides, len(labels)
        self.sentences = [
            *self._of_source(len(labels)),
            *(x for side in sides for x in remarks(side.found, side.name)),
        ]
        self.sentences = list(dict.fromkeys(self.sentences))
        self._quietly("window", max=max(len(labels), self.window))
        self._quietly("query", max=max(len(labels) - 1, self.query))
        self.other_row.layout.display = "" if self.compare else "none"
        names = [html.escape(", ".join(filter(None, (side.where, side.name)))) for side in sides]
        letters = ["A ", "B "] if self.compare else [""]
        numbers = zip(letters, names, sides, strict=True)
        lines = [f"<b>{letter}{name}</b>: {in_words(side.found)}" for letter, name, side in numbers]
        said = "".join(f'<div style="color:#A50F15">{html.escape(x)}</div>' for x in self.sentences)
        self.message.value = f'<div style="line-height:1.25;font-size:11px">{"<br>".join(lines)}{said}</div>'
        self.line.value = self.as_python()

    def _of_source(self, length: int) -> list[str]:
        """What is to be said of the text and the layer."""
        said = []
        if self.query >= length:
            said.append(f"Query {self.query} is beyond the {length} tokens: the last one's row is drawn.")
        if self._model is None:
            return said
        if (whole := self._tokens()[1]) > length:
            said.append(f"The text has {whole} tokens: the first {length} are read; length says how many.")
        layers = {self.layer, self.other_layer} if self.compare else {self.layer}
        for layer in sorted(layers):
            head = self._head(layer, 0)
            if head.window is None:
                said.append(f"Layer {layer} is global: in the model it is full attention. Window and map are yours.")
            elif head.feature_map is None:
                said.append(f"Layer {layer} has no residual branch in the model. The map is yours.")
            elif head.meta_tokens:
                said.append(f"Layer {layer}'s state begins with learned pairs, which are not drawn.")
            if head.window not in (None, self.window):
                said.append(f"In the model, the window of layer {layer} is {head.window}.")
        return said

    def _fail(self, error: Exception) -> None:
        self.error = f"{type(error).__name__}: {error}"
        self.message.value = (
            f'<div class="workbench-error" style="color:#A50F15;line-height:1.25;font-size:11px;white-space:pre-wrap">'
            f"{html.escape(self.error)}\n<b>The picture is still the one before.</b></div>"
        )

    def _changed(self, change: Any) -> None:
        if self._quiet:
            return
        if change.owner is self.controls["source"]:
            try:
                self._read_source(self.source)
            except Exception as error:
                self._fail(error)
                return
        self._draw()

    def _export(self, path: str) -> None:
        self.written.value = ""
        self.written.value = f"written: {html.escape(str(self.export(path)))}"

    def _press(self, act: Callable[[], object]) -> None:
        """What a button does; what goes wrong is said."""
        try:
            act()
        except Exception as error:
            self._fail(error)


def _ipywidgets() -> ModuleType:
    try:
        import ipywidgets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Workbench needs ipywidgets: pip install 'rattn-eqx[notebooks]'") from error
    return ipywidgets
