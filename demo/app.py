r"""A page on which models listen side by side: each answers the same instruction about the same clip.

    python demo/app.py
    python demo/app.py --model ours=runs/quickstart/checkpoint --model vanilla=runs/quickstart/training/vanilla \
        --text-llm runs/quickstart/base

Without options, it shows the nano LSM of the repository and, after `make quickstart`, what was trained as in the paper.
A Space has no options: it reads the environment variables LSM_MODELS (`NAME=ID,NAME=ID`) and LSM_TEXT_LLM.
"""

import html
import os
from collections.abc import Iterator

from jinja2 import TemplateError

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("demo"):
    import gradio as gr
    from asking import EXAMPLE, LIMITS, TEXT_LLM, Asked, Panel, parse_models, shipped

SUGGESTIONS = (
    "Translate what you hear into Spanish.",
    "List the keywords of the speech.",
    "What is the intent of the speech?",
    "Say what you hear in other words.",
    "Who does the action in what is said?",
    "Number the main words of what is said.",
    "Please transcribe the speech.",
)
ABOUT = {
    "ours": "Aligned, then distilled; its LLM is as it was.",
    "vanilla": "Trained on transcription alone.",
    "paper": "The whole LLM was trained on the text LLM's answers.",
}
TITLE = "# Does it listen to you, or only to the speech?\nEach model answers the same instruction about the same clip."
NANO = """The nano models know three hundred words in the voices of a synthesiser, and do not understand yours: take the
example."""
ALONE = "Vanilla and the paper's model are here after `make quickstart`."
BEGUN = "Vanilla and the paper's model learned for the few minutes of the quickstart, in which they only begin to hear."
PICTURE = """### Where an answer comes from
The share that the instruction and the speech have in the answer, layer by layer: of the saliency (attention times the
gradient of the answer's loss), of the saliency of a single token, and of the attention."""
ALT = "Lines over layers: the chosen model, and the text LLM that reads the transcript"
TYPED, HEARD = "Transcript (optional)", "Transcript, as the first model heard it"
READ = "What the text LLM reads; if it is empty, what the first model hears."
CSS = """
.gradio-container {--block-info-text-color: color-mix(in srgb, var(--body-text-color) 70%, transparent)}
.message p {margin: 0; padding: 0.7em 1em; border-left: 4px solid #a8323e; background: var(--block-background-fill);
            color: var(--body-text-color)}
.picture {max-width: 36rem; margin: 0 auto}
.picture img {padding: 0.5rem; background: white}
"""


class Page:
    """The widgets, and what happens when they are used. One visitor is answered after the other. `note` is what they
    should know about the models, in Markdown."""

    def __init__(self, panel: Panel, note: str = ""):
        self.panel, self.names = panel, list(panel.models)
        with gr.Blocks(title="LSM", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            gr.Markdown(f"{TITLE}\n\n{note}")
            with gr.Row():
                self._question()
            self.message = gr.HTML(elem_classes="message")
            with gr.Row():
                about = {**dict.fromkeys(self.names), **ABOUT}
                columns = {name: about[name] for name in self.names} | {TEXT_LLM: "Reads the transcript."}
                self.answers = [gr.Textbox(label=name, info=columns[name], lines=3, min_width=240) for name in columns]
            gr.Markdown(PICTURE)
            self.chosen = gr.Radio(self.names, value=self.names[0], label="Answer of")
            self.picture = gr.Image(
                show_label=False, format="png", interactive=False, buttons=[], elem_classes="picture", alt_text=ALT
            )
            self.asked = gr.State()
            self._connect()

    def _question(self) -> None:
        with gr.Column(min_width=300):
            self.clip = gr.Audio(
                sources=["upload", "microphone"], type="filepath", label="Clip, up to 60 s", buttons=[]
            )
            gr.Examples([[str(EXAMPLE)]], self.clip, label="Example", cache_examples=False)
        with gr.Column(min_width=300):
            self.instruction = gr.Textbox(label="Instruction", value=SUGGESTIONS[0], max_length=1000)
            suggestions = [[text] for text in SUGGESTIONS]
            gr.Examples(suggestions, self.instruction, label="Suggestions", cache_examples=False)
            self.transcript = gr.Textbox(label=TYPED, info=READ, max_length=4000)
            self.button = gr.Button("Ask", variant="primary")

    def _connect(self) -> None:
        models = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
        given = [self.clip, self.instruction, self.transcript, self.asked]
        shown = [self.message, self.asked, self.picture, self.transcript, *self.answers]
        drawn = [self.picture, self.message]
        asking = gr.on([self.button.click, self.instruction.submit], self.ask, given, shown, **models)
        drawing = asking.then(self.draw, [self.asked, self.chosen], drawn, **models)
        redrawing = self.chosen.change(self.draw, [self.asked, self.chosen], drawn, **models)
        stopped = self.clip.change(None, cancels=[asking, drawing, redrawing])
        stopped.then(self.forget, [self.asked, self.transcript], shown, api_visibility="private")

    def ask(self, clip: str | None, instruction: str, transcript: str, before: Asked | None) -> Iterator[dict]:
        """Show the answers as they grow, or what is wrong with the question."""
        typed = "" if before and transcript == before.heard else transcript
        nothing = self._nothing(typed)
        yield nothing
        try:
            for asked in self.panel.ask(clip, instruction, typed):
                answers = [asked.answers.get(name, "") for name in (*self.names, TEXT_LLM)]
                said = gr.update(value=asked.row["transcript"], label=HEARD if asked.heard else TYPED)
                yield {self.transcript: said, self.asked: asked, **dict(zip(self.answers, answers, strict=True))}
        except (ValueError, RuntimeError, OSError, TemplateError) as error:
            yield nothing | {self.message: _alert(error)}

    def draw(self, asked: Asked | None, name: str) -> dict:
        """Show where the answer of the chosen model comes from."""
        if asked is None or not asked.done:  # the visitor took another clip meanwhile
            return {self.picture: None}
        try:
            return {self.picture: self.panel.picture(asked, name), self.message: ""}
        except (ValueError, RuntimeError) as error:
            return {self.picture: None, self.message: _alert(error)}

    def forget(self, asked: Asked | None, transcript: str) -> dict:
        """Empty the page for another clip. Only a transcript that was typed stays."""
        typed = "" if asked and transcript == asked.heard else transcript
        return self._nothing(typed)

    def _nothing(self, typed: str) -> dict:
        said = gr.update(value=typed, label=TYPED)
        empty = {self.message: "", self.asked: None, self.picture: None, self.transcript: said}
        return empty | dict.fromkeys(self.answers, "")


def _alert(error: Exception) -> str:
    return f'<p role="alert">{html.escape(str(error))}</p>'


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--model", action="append", metavar="NAME=FOLDER_OR_ID", help="a model that listens; may be given several times"
    )
    parser.add_argument("--text-llm", help="folder or Hub id of the text LLM that the first model was composed of")
    args = parser.parse_args()
    here, reader = shipped()
    entries = args.model or [entry for entry in os.environ.get("LSM_MODELS", "").split(",") if entry]
    try:
        models = parse_models(entries) or here
        panel = Panel.open(models, args.text_llm or os.environ.get("LSM_TEXT_LLM") or reader)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    page = Page(panel, f"{NANO} {ALONE if len(models) == 1 else BEGUN}" if models == here else "")
    more = {"run_history": False, "footer_links": ["gradio", "settings"], "state_session_capacity": 100}
    page.blocks.launch(css=CSS, max_file_size=LIMITS.body, **more)


if __name__ == "__main__":
    main()
