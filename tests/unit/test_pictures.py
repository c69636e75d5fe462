from PIL import Image

from selma_ray.pictures import data_uri, file_uri, picture_grid, png_bytes, thumbnail

RED, BLUE = (200, 0, 0), (0, 0, 200)
ROWS = [[Image.new("RGB", (4, 4), RED)], [Image.new("RGB", (4, 4), BLUE), Image.new("RGB", (4, 2), RED)]]


def has_ink(picture: Image.Image, box: tuple[int, int, int, int]) -> bool:
    return min(picture.convert("L").crop(box).tobytes()) < 128


def test_images_stand_in_rows_of_cells() -> None:
    picture = picture_grid(ROWS, 8, gap_px=2, margin_px=1)
    assert picture.size == (1 + 8 + 2 + 8 + 1, 1 + 8 + 2 + 8 + 1)
    assert [picture.getpixel(place) for place in ((1, 1), (1, 11), (11, 11))] == [RED, BLUE, RED]
    assert [picture.getpixel(place) for place in ((0, 0), (11, 1), (11, 15))] == [(255, 255, 255)] * 3


def test_a_transparent_ground_is_left_between_images() -> None:
    picture = picture_grid(ROWS, 8, gap_px=2, margin_px=0, transparent=True)
    assert [picture.getpixel(place)[3] for place in ((0, 0), (9, 0), (17, 10))] == [255, 0, 255]  # type: ignore[index]


def test_words_stand_beside_above_and_below_their_images() -> None:
    beside = picture_grid(ROWS, 40, labels=("base", "merged"))
    assert has_ink(beside, (0, 6, 60, 46))
    assert beside.getpixel((84, 6)) == RED
    above = picture_grid(ROWS, 40, titles=("counting", "style"))
    assert has_ink(above, (6, 6, 80, 30))
    assert above.getpixel((6, 30)) == RED
    below = picture_grid(ROWS, 40, captions=(("one",), ("two", "three")))
    assert has_ink(below, (6, 46, 46, 80))
    assert below.getpixel((6, 6 + 40 + 34 + 6)) == BLUE
    last = picture_grid(ROWS, 40, captions=((), ("two", "three")))
    assert last.height == below.height - 34
    assert last.getpixel((6, 6 + 40 + 6)) == BLUE


def test_small_images_are_enlarged_by_whole_pixels_and_keep_their_shape() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    assert thumbnail(image, 8).size == (8, 4)
    assert [thumbnail(image, 8).getpixel((column, 0)) for column in (0, 3, 4, 7)] == [RED, RED, BLUE, BLUE]


def test_images_in_a_page_are_png_where_they_are_small() -> None:
    small, large = Image.new("RGB", (4, 4), RED), Image.new("RGB", (400, 4), RED)
    assert data_uri(small) == file_uri(png_bytes(small), "png")
    assert data_uri(large).startswith("data:image/jpeg;base64,")
