"""What becomes of a picture that is no square."""

# Apart from the image processors, whose imports take seconds: recipes are checked without them.
from typing import Literal

ImageAspectRatio = Literal["pad", "square", "crop"]
"""`pad` adds borders of the image processor's mean colour, `square` stretches the picture, `crop`
cuts out its centre"""
