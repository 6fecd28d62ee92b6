"""The figure of `pair_map` as a panel of controls, for notebooks. Needs ipywidgets: the extra `notebooks`."""

import html
import time
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from pallas.feature_map import FeatureMap, named
from rattn_eqx.figures import pair_map

HEAD_SIZES = (8, 16, 32, 64, 128)


class Panel:
    """Controls of feature map, window, head size and scale above one picture, which is drawn anew on each change.

    q, k and v are those of `pair_map.random_head`, `length` tokens drawn from `seed`. What goes wrong, in a map of your
    own for example, is said below the controls, and the last picture stays.

    Attributes:
      feature_map, window, head_size, scale: the ipywidgets controls; setting a `.value` draws.
      picture: the `ipywidgets.Image` of PNG bytes.
      message: the `ipywidgets.HTML` below the controls: what was drawn and how long it took, or what went wrong.
      error: the text of what went wrong in the last change, or None.
    """

    def __init__(
        self,
        feature_maps: dict[str, FeatureMap] | None = None,
        *,
        length: int = 64,
        window: int = 16,
        head_size: int = 32,
        scale: float = 1.0,
        seed: int = 0,
    ):
        """`feature_maps` joins the named ones of `pallas.feature_map`; the panel begins with the paper's softmax."""
        widgets = _ipywidgets()
        self.maps: dict[str, FeatureMap] = {**named, **(feature_maps or {})}
        self.length, self.seed, self.error = length, seed, None
        look: Any = dict(style={"description_width": "8em"}, layout={"width": "30em"})
        self.feature_map = widgets.Dropdown(options=list(self.maps), description="feature map", **look)
        look |= dict(continuous_update=False)
        self.window = widgets.IntSlider(window, 0, length, description="window W", **look)
        self.head_size = widgets.SelectionSlider(
            options=sorted({*HEAD_SIZES, head_size}), value=head_size, description="head size d", **look
        )
        self.scale = widgets.FloatLogSlider(
            scale, base=2, min=-3, max=3, step=0.25, readout_format=".2f", description="scale of q, k", **look
        )
        self.message = widgets.HTML()
        self.picture = widgets.Image(format="png", layout={"width": "960px", "max_width": "100%"})
        controls = (self.feature_map, self.window, self.head_size, self.scale)
        rows = [widgets.HBox(controls[:2]), widgets.HBox(controls[2:])]
        self.box = widgets.VBox([*rows, self.message, self.picture])
        self._redraw()
        for control in controls:
            control.observe(self._redraw, "value")

    def add(self, name: str, feature_map: FeatureMap) -> None:
        """Offer a map under this name, in place of an earlier one of that name, and draw it."""
        self.maps[name] = feature_map
        self.feature_map.unobserve(self._redraw, "value")
        self.feature_map.options = list(self.maps)
        self.feature_map.value = name
        self.feature_map.observe(self._redraw, "value")
        self._redraw()

    def figure(self) -> Figure:
        """The figure of the controls' values."""
        name, window, d, scale = (x.value for x in (self.feature_map, self.window, self.head_size, self.scale))
        q, k, v = pair_map.random_head(length=self.length, head_size=d, scale=scale, seed=self.seed)
        found = pair_map.pair_map(q, k, v, window=window, feature_map=self.maps[name])
        return pair_map.draw(found, f"φ = {name}, W = {window}, d = {d}, scale {scale:.3g}, T = {self.length}")

    def _redraw(self, change: object = None) -> None:
        began = time.perf_counter()
        try:
            self.picture.value = pair_map.png(self.figure())
        except Exception as error:  # of a user's map too, which may raise anything
            self.error = f"{type(error).__name__}: {error}"
            said = f"{self.feature_map.value}: {self.error}"
            self.message.value = (
                f'<div class="panel-error" style="color: #B00020; line-height: 1.3; white-space: pre-wrap">'
                f"{html.escape(said)}\n<b>The picture is still the one before.</b></div>"
            )
        else:
            self.error = None
            self.message.value = f"drawn in {time.perf_counter() - began:.2f} s"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = self.box._repr_mimebundle_(**options)
        return bundle and bundle | {"text/plain": "the live panel: run the notebook to see and use it"}


def _ipywidgets() -> ModuleType:
    try:
        import ipywidgets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Panel needs ipywidgets: pip install 'rattn-eqx[notebooks]'") from error
    return ipywidgets
