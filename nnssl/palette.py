"""The colours of all figures: Okabe and Ito's palette, which readers who are blind to some colours tell apart too.

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
"""Of lines on a page, those that differ most first; yellow is too pale for them."""
ON_IMAGES = (ORANGE, SKY_BLUE, BLUISH_GREEN, YELLOW, BLUE, VERMILION, REDDISH_PURPLE)
"""Of areas over grey values, the bright ones first."""
