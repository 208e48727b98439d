"""The denoiser's architecture: a 3D U-Net in Keras alone, so that any back-end runs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LOG_VARIANCE = (-16.0, 6.0)  # between these training has a gradient; what lies beyond means no more
_TOLD = 64  # width of the two layers that read what the network is told


def condition(
    fsc: npt.NDArray[Any] | None, frequency: npt.NDArray[np.float64], model_pixel: float, knots: int
) -> npt.NDArray[np.float32]:
    """Return what a network is told of the data: the half-maps' FSC at fixed frequencies, and that it is known.

    Parameters
    ----------
    fsc : (shells,) float64, optional
        None where it is not known: all is 0 then, and training has seen that too.
    frequency : (shells,) float64
        Of the shells, in 1/angstrom, increasing.
    model_pixel : float
        The model's pixel size in angstrom: the frequencies go up to its Nyquist frequency.
    knots : int

    Returns
    -------
    (knots + 1,) float32
    """
    told = np.zeros(knots + 1, dtype=np.float32)
    if fsc is not None:
        at = (np.arange(knots) + 0.5) / knots * 0.5 / model_pixel
        told[:knots] = np.interp(at, frequency, np.clip(fsc, 0.0, 1.0), right=0.0)
        told[knots] = 1.0
    return told


def build_unet(
    width: int = 4,
    depth: int = 5,
    momentum: float = 0.99,
    *,
    l2: float = 0.0,
    dtype: str = "float32",
    synchronized: bool = False,
    knots: int = 0,
    uncertainty: bool = False,
) -> Any:
    """Build the residual network: it predicts what has to be subtracted from its input.

    Kimanius et al. 2021, section 2.3: `depth` stages down (average pooling) and up (transposed convolution of
    stride 2), joined by concatenation; each stage is twice batch normalisation, ReLU and a 3x3x3 convolution
    without bias. The first convolution has `width` channels, doubled at each lower stage.

    Parameters
    ----------
    width, depth : int
    momentum : float
        Of the moving averages of batch normalisation.
    l2 : float
        Adds `l2` times the sum of squares of the kernels to the loss.
    dtype : str
        Keras' name for the precision, such as ``mixed_bfloat16``; weights and output are float32 in any case.
    synchronized : bool
        Normalise over the batches of all devices together (TensorFlow; the other back-ends need no telling).
    knots : int
        Numbers that tell how good the data are (`condition`): they scale and shift the features below full
        resolution (FiLM; Perez et al. 2018, AAAI 32). 0 builds the published network, which sees the map alone.
    uncertainty : bool
        A second channel: the logarithm of the variance of what is left of the error.

    Returns
    -------
    keras.Model
        (batch, z, y, x, 1) float32 to (batch, z, y, x, 1 or 2); z, y, x are multiples of ``2**depth``. With `knots`
        the inputs are a list, the second being (batch, knots + 1) float32.
    """
    import keras
    from keras import layers

    penalty = keras.regularizers.L2(l2) if l2 else None
    kernel: dict[str, Any] = {"use_bias": False, "kernel_regularizer": penalty, "dtype": dtype}
    average: dict[str, Any] = {"momentum": momentum, "epsilon": 1e-5, "synchronized": synchronized, "dtype": dtype}

    told = None
    inputs: Any = layers.Input((None, None, None, 1))
    x = inputs
    if knots:
        quality = layers.Input((knots + 1,))
        inputs = [x, quality]
        told = quality
        for _ in range(2):
            told = layers.Dense(_TOLD, activation="relu", dtype=dtype)(told)

    def stage(x: Any, channels: int) -> Any:
        for part in range(2):
            x = layers.BatchNormalization(**average)(x)
            if told is not None and part == 1 and channels > width:
                # Not at full resolution, where it would cost a third of the time. At first it changes nothing.
                scale, shift = (
                    layers.Reshape((1, 1, 1, channels), dtype=dtype)(
                        layers.Dense(channels, kernel_initializer="zeros", bias_initializer=start, dtype=dtype)(told)
                    )
                    for start in ("ones", "zeros")
                )
                x = layers.Add(dtype=dtype)([layers.Multiply(dtype=dtype)([x, scale]), shift])
            x = layers.ReLU(dtype=dtype)(x)
            x = layers.Conv3D(channels, 3, padding="same", **kernel)(x)
        return x

    x = layers.Conv3D(width, 3, padding="same", **kernel)(x)
    skips = []
    for level in range(depth):
        x = stage(x, width * 2**level)
        skips.append(x)
        x = layers.AveragePooling3D(2, dtype=dtype)(x)
    x = stage(x, width * 2**depth)
    for level in reversed(range(depth)):
        x = layers.Conv3DTranspose(width * 2**level, 2, strides=2, **kernel)(x)
        x = layers.Concatenate(dtype=dtype)([x, skips[level]])
        x = stage(x, width * 2**level)
    # Starting from zero, the untrained network returns its input unchanged.
    channels = 2 if uncertainty else 1
    outputs = layers.Conv3D(channels, 1, kernel_initializer="zeros", kernel_regularizer=penalty, dtype="float32")(x)
    return keras.Model(inputs, outputs, name=f"unet_width{width}_depth{depth}")


def scaled(network: Any, factor: float) -> Any:
    """Return a network whose estimate, the map minus its output, is `factor` times that of another.

    Parameters
    ----------
    network : keras.Model
        Of `build_unet`.
    factor : float
    """
    import keras
    from keras import layers

    first = network.inputs[0]
    error = layers.Rescaling(factor)(network.output[..., :1])
    outputs = [layers.Add()([error, layers.Rescaling(1 - factor)(first)])]
    if network.output.shape[-1] == 2:
        outputs.append(layers.Rescaling(1.0, offset=2 * float(np.log(factor)))(network.output[..., 1:]))
    joined = outputs[0] if len(outputs) == 1 else layers.Concatenate()(outputs)
    return keras.Model(network.inputs, joined, name=network.name)
