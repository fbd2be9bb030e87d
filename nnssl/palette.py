"""The colours of all figures: Okabe and Ito's palette, which colour-blind readers can distinguish.

Source: Okabe and Ito, Color universal design, 2008.
"""

ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
BLUISH_GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILION = "#D55E00"
REDDISH_PURPLE = "#CC79A7"

ON_WHITE = (BLUE, VERMILION, BLUISH_GREEN, REDDISH_PURPLE, ORANGE, SKY_BLUE)
"""Colours of lines on a white page, most distinct first; yellow is too pale for lines."""
ON_IMAGES = (ORANGE, SKY_BLUE, BLUISH_GREEN, YELLOW, BLUE, VERMILION, REDDISH_PURPLE)
"""Colours of areas on grey images, brightest first."""
