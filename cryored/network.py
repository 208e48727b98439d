"""The denoiser's architecture: a 3D U-Net in Keras alone, so that any back-end runs it."""

from __future__ import annotations

from typing import Any


def build_unet(
    width: int = 4,
    depth: int = 5,
    momentum: float = 0.99,
    *,
    l2: float = 0.0,
    dtype: str = "float32",
    synchronized: bool = False,
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

    Returns
    -------
    keras.Model
        (batch, z, y, x, 1) float32 to the same shape; z, y, x are multiples of ``2**depth``.
    """
    import keras
    from keras import layers

    penalty = keras.regularizers.L2(l2) if l2 else None
    kernel: dict[str, Any] = {"use_bias": False, "kernel_regularizer": penalty, "dtype": dtype}
    average: dict[str, Any] = {"momentum": momentum, "epsilon": 1e-5, "synchronized": synchronized, "dtype": dtype}

    def stage(x: Any, channels: int) -> Any:
        for _ in range(2):
            x = layers.BatchNormalization(**average)(x)
            x = layers.ReLU(dtype=dtype)(x)
            x = layers.Conv3D(channels, 3, padding="same", **kernel)(x)
        return x

    inputs = layers.Input((None, None, None, 1))
    x = layers.Conv3D(width, 3, padding="same", **kernel)(inputs)
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
    outputs = layers.Conv3D(1, 1, kernel_initializer="zeros", kernel_regularizer=penalty, dtype="float32")(x)
    return keras.Model(inputs, outputs, name=f"unet_width{width}_depth{depth}")
