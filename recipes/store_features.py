"""Store the output of the frozen audio tower. It never changes, so epochs and models can share it.

    python -m recipes.store_features --model checkpoints/base --corpus CORPUS --splits train test --output features

`--audio_feature_store` of `recipes.align` and `recipes.sft`, and `--audio-feature-store` of `recipes.evaluate` read the
folder. The same command on another corpus adds its clips to it.
"""

from language_models.command_line import parser_of
from language_models.extras import extra

with extra("data"):
    import torch

    from dataset_builders.corpora.opening import open_corpus
    from language_models.checkpoints import load_processor, open_model
    from modeling_lsm import LsmForConditionalGeneration
    from recipes.listening.features import AudioFeatureStore, warn_of_language


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of an LSM with the audio tower")
    parser.add_argument("--corpus", required=True, help="ASR corpus, as dataset_builders.self_powered build takes it")
    parser.add_argument("--splits", nargs="+", default=["train"], help="splits of the corpus")
    parser.add_argument("--output", required=True, help="folder of the store; clips that it lacks are added")
    parser.add_argument("--batch-size", type=int, default=32, help="clips per batch")
    args = parser.parse_args()
    model = open_model(args.model, LsmForConditionalGeneration, merge=False).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def clips():
        return (utterance["audio"] for split in args.splits for utterance in open_corpus(args.corpus, split))

    for split in args.splits:
        warn_of_language(model.config, args.corpus, open_corpus(args.corpus, split).language)
    store = AudioFeatureStore.build(args.output, model, load_processor(args.model), clips(), args.batch_size)
    print(f"{args.output}: {len(store.clips)} clips, {len(store.frames)} frames")


if __name__ == "__main__":
    main()
