"""In torchaudio's place, of which there is no CPU build for the torch that is tested with: the one transform that
Granite Speech's feature extractor asks for."""

from types import SimpleNamespace

import torch


class MelSpectrogram(torch.nn.Module):
    """Power mel spectrogram, `(..., samples)` to `(..., mels, frames)`, as torchaudio's: HTK mels, centred frames."""

    def __init__(self, sample_rate: int, n_fft: int, win_length: int, hop_length: int, n_mels: int):
        from transformers.audio_utils import mel_filter_bank  # which imports this module

        super().__init__()
        self.settings = {"n_fft": n_fft, "win_length": win_length, "hop_length": hop_length, "return_complex": True}
        filters = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate, mel_scale="htk")
        self.register_buffer("filters", torch.from_numpy(filters).float())
        self.register_buffer("window", torch.hann_window(win_length))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(waveform, window=self.window, **self.settings).abs().square()
        return (spectrum.transpose(-1, -2) @ self.filters).transpose(-1, -2)


transforms = SimpleNamespace(MelSpectrogram=MelSpectrogram)
__version__ = "0"
