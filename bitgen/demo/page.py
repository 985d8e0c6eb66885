"""The layout of the page: tabs of gradio components around `actions` and `inspection`."""

from typing import Any

import numpy as np

from bitgen.demo import actions, components, inspection, uploads
from bitgen.demo.actions import Tools
from bitgen.hub.zoo import describe
from bitgen.samplers.edits import KINDS

_KINDS = [
    ("Inpaint: draw the painted area anew", "inpaint"),
    ("Outpaint: keep the painted area, draw the rest", "outpaint"),
    ("Edit: draw the painted area as a class", "edit"),
]


def build(tools: Tools) -> Any:
    """Returns the page as gradio Blocks, queued and ready to launch."""
    gr = components.gradio()
    with gr.Blocks(title="bitgen", analytics_enabled=False) as page:
        gr.Markdown(f"# bitgen\n{_about(tools)}")
        with gr.Tab("Generate"):
            _generate(gr, tools)
        with gr.Tab("From class to class"):
            _interpolate(gr, tools)
        with gr.Tab("Your picture"):
            picture = _upload(gr, tools)
            with gr.Tab("Redraw"):
                _redraw(gr, tools, *picture)
            with gr.Tab("Enrich"):
                _enrich(gr, tools, picture[0])
            with gr.Tab("Compare tokenizers"):
                _compare(gr, tools, picture[0])
            with gr.Tab("Bits of a token"):
                _bits(gr, tools, picture[0])
    return page


def _about(tools: Tools) -> str:
    lines = []
    for model in (tools.pipeline.generator, tools.pipeline.tokenizer):
        if model is not None:
            size = describe(model.info["family"], model.info["hparams"])
            lines.append(f"{model.info['kind']}: **{model.info['family']}**, {size}, {model.path}")
    return "  \n".join(lines)


def _generate(gr: Any, tools: Tools) -> None:
    if reason := actions.why_not(tools.pipeline, "draw"):
        gr.Markdown(reason)
        return
    plan, names = tools.pipeline.plan(**tools.sampler), components.classes(tools)
    with gr.Row():
        with gr.Column(scale=1):
            labels = gr.Dropdown(names, value=[0], multiselect=True, label="Classes")
            count = gr.Slider(1, tools.limits.images, 4, step=1, label="Images of each class")
            seed = components.seed_of(gr)
            guidance = gr.Slider(1, 12, plan.guidance, step=0.1, label="Guidance")
            steps = components.steps_of(gr, plan)
            button = gr.Button("Draw", variant="primary", elem_id="generate")
        with gr.Column(scale=2):
            picture = components.image_of(gr, "Images", "images", titled=False)
            status = gr.Markdown(elem_id="status")

    def run(labels, count, seed, guidance, steps=None):
        settings = {} if steps is None else {"iterations": int(steps)}
        yield gr.skip(), "drawing; the first time in a size, a program is compiled before"
        yield from actions.generate(
            tools, labels, int(count), int(seed or 0), guidance=float(guidance), **settings
        )

    inputs = [labels, count, seed, guidance] + ([steps] if steps else [])
    components.on(gr, button.click, run, inputs, [picture, status])


def _interpolate(gr: Any, tools: Tools) -> None:
    if reason := actions.why_not(tools.pipeline, "edit"):
        gr.Markdown(reason)
        return
    names, most = components.classes(tools), tools.limits.images
    with gr.Row():
        with gr.Column(scale=1):
            first = gr.Dropdown(names, value=0, label="From")
            second = gr.Dropdown(names, value=min(1, len(names) - 1), label="To")
            steps = gr.Slider(2, max(most, 2), min(9, most), step=1, label="Images on the way")
            seed = components.seed_of(gr)
            guidance = components.guidance_of(gr, "interpolate")
            button = gr.Button("Draw the way", variant="primary", elem_id="interpolate")
        with gr.Column(scale=2):
            share = gr.Slider(
                0, 100, 0, step=1, label="Share of the second class, %", elem_id="share"
            )
            image = components.image_of(gr, "Image", "between")
            gallery = components.gallery_of(gr, "All", columns=6)
    way = gr.State([])

    def run(first, second, steps, seed, guidance):
        cells = actions.interpolate(
            tools, first, second, int(steps), int(seed or 0), guidance=float(guidance)
        )
        return cells, cells, at(cells, 0), 0

    def at(cells, share):
        if not cells:
            return None
        return cells[round(share / 100 * (len(cells) - 1))][0]

    inputs = [first, second, steps, seed, guidance]
    components.on(gr, button.click, run, inputs, [way, gallery, image, share])
    components.on(gr, share.change, at, [way, share], [image], quick=True)


def _upload(gr: Any, tools: Tools) -> tuple[Any, Any]:
    """Returns the state that holds the picture, and the component that shows it to the brush."""
    state = gr.State(None)
    limits = tools.limits
    with gr.Row():
        button = gr.UploadButton("Choose a picture", elem_id="upload", variant="primary")
        draws = not actions.why_not(tools.pipeline, "draw")
        if draws:
            names = components.classes(tools)
            label = gr.Dropdown(names, value=0, label="or let the model draw one of")
            seed = components.seed_of(gr)
            drawn = gr.Button("Draw one", elem_id="example")
    gr.Markdown(
        f"A picture of any shape, up to {limits.megabytes:g} MB and {limits.megapixels:g} "
        f"megapixels. The model sees its centre square, as {tools.pipeline.image_size} x "
        f"{tools.pipeline.image_size} pixels."
    )
    editor = gr.ImageEditor(
        label="Your picture: paint the area with the brush",
        type="pil",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=40, colors=["#ff7800"], color_mode="fixed"),
        canvas_size=(384, 384),
        elem_id="editor",
    )

    def show(picture):
        return picture, {"background": uploads.shown(picture), "layers": [], "composite": None}

    def upload(path):
        return show(uploads.read_upload(path, limits))

    def example(label, seed):
        return show(actions.example(tools, label, int(seed or 0)))

    components.on(gr, button.upload, upload, [button], [state, editor])
    if draws:
        components.on(gr, drawn.click, example, [label, seed], [state, editor])
    return state, editor


def _redraw(gr: Any, tools: Tools, state: Any, editor: Any) -> None:
    if reason := actions.why_not(tools.pipeline, "edit"):
        gr.Markdown(reason)
        return
    with gr.Row():
        with gr.Column(scale=1):
            kind = gr.Radio(_KINDS, value="inpaint", label="What to do")
            label = components.class_or_none(gr, tools)
            count = gr.Slider(1, tools.limits.images, 4, step=1, label="Variants")
            # Closed, so that the button is visible without scrolling.
            with gr.Accordion("More settings", open=False):
                seed = components.seed_of(gr)
                guidance = components.guidance_of(gr, "inpaint")
                steps = gr.Slider(1, 100, KINDS["inpaint"].iterations, step=1, label="Steps")
            button = gr.Button("Redraw", variant="primary", elem_id="redraw")
        with gr.Column(scale=2):
            laid = components.gallery_of(gr, "In your picture", "laid")
            whole = components.gallery_of(gr, "What the model makes of the whole", "whole")

    def run(picture, painted, kind, label, count, seed, guidance, steps):
        return actions.redraw(
            tools,
            kind,
            picture,
            (painted or {}).get("layers"),
            None if label == components.NO_CLASS else label,
            int(count),
            int(seed or 0),
            guidance=float(guidance),
            iterations=int(steps),
        )

    inputs = [state, editor, kind, label, count, seed, guidance, steps]
    components.on(gr, button.click, run, inputs, [laid, whole])


def _enrich(gr: Any, tools: Tools, state: Any) -> None:
    if reason := actions.why_not(tools.pipeline, "edit"):
        gr.Markdown(reason)
        return
    with gr.Row():
        with gr.Column(scale=1):
            gr.Markdown("Reduces the picture, and draws the detail that was lost.")
            label = components.class_or_none(gr, tools)
            rate = gr.Slider(2, 8, 2, step=1, label="Reduce by")
            rounds = gr.Slider(1, min(8, tools.limits.images), 2, step=1, label="Rounds")
            seed = components.seed_of(gr)
            guidance = components.guidance_of(gr, "enrich")
            button = gr.Button("Enrich", variant="primary", elem_id="enrich")
        with gr.Column(scale=2):
            gallery = components.gallery_of(gr, "Rounds")

    def run(picture, label, rate, rounds, seed, guidance):
        label = None if label == components.NO_CLASS else label
        return actions.enrich(
            tools,
            picture,
            label,
            int(rate),
            int(rounds),
            int(seed or 0),
            guidance=float(guidance),
        )

    components.on(gr, button.click, run, [state, label, rate, rounds, seed, guidance], [gallery])


def _compare(gr: Any, tools: Tools, state: Any) -> None:
    if len(tools.tokenizers) == 1:
        gr.Markdown("Start the page with `--config.tokenizers=DIR,zoo:NAME` to compare more.")
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    table = gr.Markdown(elem_id="table")
    gallery = components.gallery_of(gr, "Picture, reconstruction, difference", columns=3)

    def run(picture):
        rows, cells = inspection.compare(tools, picture)
        head = ["tokenizer", "pixels", "bits", "bits a pixel", "PSNR, dB"]
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines), cells

    components.on(gr, button.click, run, [state], [table, gallery])


def _bits(gr: Any, tools: Tools, state: Any) -> None:
    module = tools.pipeline.tokenizer.module
    if not module.bits:
        gr.Markdown("This tokenizer gives continuous latents: it has no bits to look at.")
        return
    scales = list(getattr(module, "scales", ())) or [tuple(module.grid)]
    with gr.Row():
        with gr.Column(scale=1):
            gr.Markdown("Look, then click a token of the picture.")
            scale = gr.Dropdown(
                [(f"{h} x {w} tokens", i) for i, (h, w) in enumerate(scales)],
                value=len(scales) - 1,
                label="Scale",
                visible=len(scales) > 1,
            )
            row = gr.Number(0, precision=0, minimum=0, label="Row")
            column = gr.Number(0, precision=0, minimum=0, label="Column")
            bit = gr.Slider(0, module.bits - 1, 0, step=1, label="Bit to flip")
            button = gr.Button("Look", variant="primary", elem_id="look")
            board = components.image_of(gr, "Token", "board")
        with gr.Column(scale=2):
            words = gr.Markdown(elem_id="words")
            flipped = components.gallery_of(gr, "What one bit does", columns=3)
            gr.Markdown("Planes of bits: white tokens have the bit set, and what share of all do.")
            planes = components.image_of(gr, "Planes of bits", "planes", titled=False)

    def look(picture, row, column, bit, scale):
        token = inspection.look_at_token(
            tools, picture, int(row or 0), int(column or 0), int(bit), int(scale)
        )
        return token.board, token.planes, f"`{token.words}`", token.flipped

    def click(scale, event: gr.SelectData):
        side = len(uploads.as_shown(np.zeros((module.image_size,) * 2 + (3,), np.uint8)))
        return inspection.token_at(event.index, scales[int(scale)], (side, side))

    inputs, outputs = [state, row, column, bit, scale], [board, planes, words, flipped]
    components.on(gr, button.click, look, inputs, outputs)
    chosen = components.on(gr, board.select, click, [scale], [row, column], quick=True)
    components.on(gr, chosen.then, look, inputs, outputs)
    components.on(gr, bit.release, look, inputs, outputs)
