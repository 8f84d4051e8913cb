"""Concepts and their instances, of which concept graphs are made: a name belongs to one concept, and is one word."""

from __future__ import annotations

from collections.abc import Mapping

SHAPES = ("circle", "square", "triangle", "hexagon", "pentagon", "star", "oval", "diamond")

_LISTS = {
    "birds": "robin sparrow eagle falcon heron pelican turkey swan crow raven magpie finch wren owl parrot stork "
             "penguin ostrich pigeon gull",
    "fish": "salmon trout cod tuna herring carp pike perch eel bass halibut mackerel sardine anchovy flounder haddock "
            "catfish sturgeon minnow shark",
    "fruits": "apple pear plum peach cherry grape melon mango banana lemon lime fig apricot papaya kiwi guava quince "
              "raspberry blueberry strawberry",
    "flowers": "rose tulip daisy lily orchid violet iris poppy peony dahlia lavender jasmine marigold sunflower lotus "
               "carnation begonia petunia crocus daffodil",
    "tools": "hammer saw drill wrench pliers chisel screwdriver file axe shovel rake hoe spade trowel clamp level "
             "mallet sander vise crowbar",
    "metals": "iron copper gold silver tin lead zinc nickel platinum titanium cobalt chromium tungsten aluminium "
              "mercury lithium sodium uranium bismuth magnesium",
    "instruments": "piano violin cello flute oboe clarinet trumpet trombone tuba harp guitar banjo mandolin drum lute "
                   "saxophone bassoon accordion organ viola",
    "vehicles": "car truck bus van tram train bicycle scooter motorcycle tractor canoe ferry yacht kayak barge "
                "helicopter glider balloon submarine rocket",
    "clothes": "shirt trousers coat jacket scarf glove hat cap sock shoe boot skirt dress sweater vest belt tie sandal "
               "apron robe",
    "vegetables": "carrot potato onion garlic leek cabbage spinach lettuce broccoli celery radish turnip pumpkin "
                  "cucumber tomato pepper bean pea beet asparagus",
}  # fmt: skip
INSTANCES: Mapping[str, tuple[str, ...]] = {concept: tuple(text.split()) for concept, text in _LISTS.items()}
