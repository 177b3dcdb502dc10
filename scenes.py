"""Scenes of the built-in images: what lies where, before it is drawn. No torch.

    classes, scene = SCENES["twins"]
    ground, objects = scene(random.Random(0), 96)                  # for an image of 96 x 96 pixels

ground: two colours, see images.draw_ground. An object, back to front, is (label, box, parts), and a
part (shape, box, colour), of an outline (shape, box, colour, width), see images.draw_shape; boxes
are xywh in pixels, tight.

plain   One to four rectangles, ellipses and triangles of any colour and of 1/5 to 3/5 of the side,
        partly over one another. Each can be told by itself.
twins   Three to six small shapes of clear colours. The class is twin where another object of the
        image has the same shape and colour, else single; nothing else tells which, and half are
        twins. At 96 pixels resnet_tiny does not see one twin from the other.
pairs   The same of rectangles alone: an equal object is one of the same colour.
dots    Two or three objects, each of three to five dots of one colour, any but the others'. The
        number is the class, the box is that of all its dots; boxes overlap freely.

A scene of a classifier is made for a label, the class of the image:

    classes, scene = CLASS_SCENES["count"]
    ground, objects = scene(random.Random(0), 64, 3)               # of class 3, "5 objects"

plain   A bright rectangle, ellipse or triangle of 1/3 to 4/5 of the side, filled or in outline, on
        dark ground: six classes.
twins   Three to five small shapes of clear colours, two of them of the same colour. The class says
        whether these two have the same shape, too. Shapes by themselves, colours, places and the
        number of objects are distributed alike in both classes.
count   Two to six bright objects of one shape and colour on dark ground; the class says how many.
        Neither colour nor shape tells, nor the area of all, and the size of each tells little.
"""

import math
from functools import partial
from itertools import combinations

from images import draw_ground, draw_shape, ground_colors

CLEAR_COLORS = ((220, 40, 40), (40, 180, 60), (50, 80, 220), (235, 210, 50), (200, 60, 200),
                (60, 200, 210))


def color_unlike(rng, colors):
    """A random colour that differs clearly from all of `colors`."""
    while True:
        color = tuple(rng.randrange(256) for _ in range(3))
        if min(sum(abs(a - b) for a, b in zip(color, other)) for other in colors) >= 150:
            return color


def place(rng, side, least, most, fits=lambda box: True):
    """A box with sides of `least` to `most` pixels, the first of 20 that fits, or None."""
    for _ in range(20):
        w, h = (round(rng.uniform(least, most)) for _ in range(2))
        box = rng.randint(0, side - w), rng.randint(0, side - h), w, h
        if fits(box):
            return box


def covered(a, b):
    """Share of the smaller of two boxes that lies in the other."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])


def gap(a, b):
    """Pixels between two boxes, by rows or columns, whichever are more; below 0: they overlap."""
    return max(a[0] - b[0] - b[2], b[0] - a[0] - a[2], a[1] - b[1] - b[3], b[1] - a[1] - a[3])


def draw_scene(rng, ground, objects, side):
    """The PIL image of a scene; rng: the one that made it."""
    image = draw_ground(rng, ground, side)
    for _, _, parts in objects:
        for shape, box, color, *width in parts:
            paint = dict(outline=color, width=width[0]) if width else dict(fill=color)
            draw_shape(image, rng, shape, box, **paint)
    return image


# -- scenes of detectors -------------------------------------------------------------------------

def plain(rng, side):
    ground, objects = ground_colors(rng), []
    for _ in range(rng.randint(1, 4)):
        color = color_unlike(rng, ground)
        box = place(rng, side, side / 5, side * 3 / 5,
                    lambda box: all(covered(box, other) < 0.3 for _, other, _ in objects))
        if box:
            label = rng.randrange(3)
            objects.append((label, box, [(label, box, color)]))
    return ground, objects


def twins(rng, side, shapes=range(3)):
    grey = rng.randrange(226)
    ground = (grey,) * 3, (grey + 30,) * 3

    # kinds (shape, colour), all different, but for the pairs
    n = rng.randint(3, 6)
    pairs = int(n / 4 + rng.random())                              # n / 4 on average
    kinds = [(shape, color) for shape in shapes for color in CLEAR_COLORS]
    kinds = rng.sample(kinds, n - pairs)
    placed = []
    for kind in kinds[:pairs] + kinds:
        box = place(rng, side, side * 14 / 96, side * 26 / 96, lambda box: all(
            gap(box, other) > (side * 25 / 96 if theirs == kind else 0)
            for theirs, other in placed))
        if box:
            placed.append((kind, box))

    # the label follows from what found a place
    kinds = [kind for kind, _ in placed]
    return ground, [(int(kinds.count(kind) > 1), box, [(kind[0], box, kind[1])])
                    for kind, box in placed]


def scatter(rng, box, count, size):
    """Boxes of `count` dots of `size` pixels that touch all four sides of `box`."""
    corners = []
    for start, length in ((box[0], box[2]), (box[1], box[3])):
        at = [rng.random() for _ in range(count)]
        least, most = min(at), max(at)
        corners.append([start + round((v - least) / (most - least) * (length - size)) for v in at])
    return [(x, y, size, size) for x, y in zip(*corners)]


def dots(rng, side):
    ground, objects, colors, taken = ground_colors(rng), [], [], []
    for _ in range(rng.randint(2, 3)):
        colors.append(color_unlike(rng, [*ground, *colors]))
        count, size = rng.randint(3, 5), max(1, round(side * rng.uniform(5, 7) / 96))

        # dots that hide no other; after 20 tries they are left out
        for _ in range(20):
            box = place(rng, side, side * 28 / 96, side * 60 / 96)
            ours = scatter(rng, box, count, size)
            if all(gap(a, b) > 0 for a, b in combinations(taken + ours, 2)):
                taken += ours
                objects.append((count - 3, box, [(1, dot, colors[-1]) for dot in ours]))
                break
    return ground, objects


# -- scenes of classifiers -----------------------------------------------------------------------

def apart(rng, side, sizes, far=0):
    """Boxes of these (w, h) at random places, of which none touch; the first two `far` apart."""
    while True:
        boxes = []
        for w, h in sizes:
            box = rng.randint(0, side - w), rng.randint(0, side - h), w, h
            least = far if len(boxes) == 1 else 0
            if any(gap(box, other) <= least for other in boxes):
                break
            boxes.append(box)
        else:
            return boxes


def dark_and_bright(rng):
    """Two dark colours for the ground, and a bright one."""
    ground = [tuple(c // 2 for c in color) for color in ground_colors(rng)]
    return ground, tuple(rng.randint(160, 255) for _ in range(3))


def class_plain(rng, side, label):
    ground, color = dark_and_bright(rng)
    w, h = (round(rng.uniform(side / 3, side * 4 / 5)) for _ in range(2))
    box = rng.randint(0, side - w), rng.randint(0, side - h), w, h
    outline = [max(1, side // 32)] if label >= 3 else []
    return ground, [(label, box, [(label % 3, box, color, *outline)])]


def class_twins(rng, side, label):
    grey = rng.randrange(96)
    ground = (grey,) * 3, (grey + 30,) * 3

    # objects 0 and 1 have one colour; of these shapes two can be equal, and two can differ
    n = rng.randint(3, 5)
    colors = rng.sample(CLEAR_COLORS, n - 1)
    colors = [colors[0], *colors]
    shapes = [0]
    while not 1 < len(set(shapes)) < n:
        shapes = [rng.randrange(3) for _ in range(n)]
    while (shapes[0] == shapes[1]) != label:
        rng.shuffle(shapes)

    sizes = [[round(side * rng.uniform(14, 26) / 96) for _ in range(2)] for _ in range(n)]
    boxes = apart(rng, side, sizes, far=side * 25 / 96)
    return ground, [(label, box, [(shape, box, color)])
                    for shape, box, color in zip(shapes, boxes, colors)]


def class_count(rng, side, label):
    n, (ground, color), shape = label + 2, dark_and_bright(rng), rng.randrange(3)

    # the area of all boxes, 4 to 24 % of the image's whatever n, in uneven shares
    total, shares = 0.04 * 6 ** rng.random(), [rng.uniform(0.2, 1) for _ in range(n)]
    sizes = []
    for share in shares:
        area, aspect = total * share / sum(shares), rng.uniform(2 / 3, 3 / 2)
        sizes.append([max(1, round(side * math.sqrt(v))) for v in (area * aspect, area / aspect)])
    return ground, [(label, box, [(shape, box, color)]) for box in apart(rng, side, sizes)]


SHAPES = "rectangle", "ellipse", "triangle"
SCENES = {"plain": (SHAPES, plain),
          "twins": (("single", "twin"), twins),
          "pairs": (("single", "pair"), partial(twins, shapes=(0,))),
          "dots": (("3 dots", "4 dots", "5 dots"), dots)}
CLASS_SCENES = {"plain": ((*SHAPES, *(f"{shape} outline" for shape in SHAPES)), class_plain),
                "twins": (("all different", "twins"), class_twins),
                "count": (tuple(f"{n} objects" for n in range(2, 7)), class_count)}
