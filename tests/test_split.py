"""A table that says which structures are held out: what it finds, and what it refuses."""

from __future__ import annotations

import pytest

from cryored.errors import InputError
from cryored.simulation.split import check_split, read_split

TABLE = """id,file,split,note
1ABC,train/1ABC.pdb.gz,train,"a, quoted"
2XYZ,held/2XYZ.cif,validation,
3DEF,test/renamed_3def.pdb,test,
4AMB,train/4AMB.pdb,train,
4AMB,test/4AMB.cif,test,
5DUP,train/5DUP.pdb,train,
5DUP,train/5DUP.cif,train,
"""


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text(TABLE)
    return path


@pytest.mark.parametrize(
    ("structure", "parts"),
    [
        ("anywhere/1ABC.pdb.gz", {"train"}),
        ("1abc.PDB.GZ", {"train"}),
        ("1ABC.cif", {"train"}),  # by its id
        ("1ABC", {"train"}),
        ("train/2XYZ.cif", {"validation"}),  # the folder says nothing
        ("renamed_3def.pdb", {"test"}),
        ("3def.cif.gz", {"test"}),
        ("4AMB.pdb", {"train", "test"}),
        ("4amb", {"train", "test"}),
        ("5DUP.pdb", {"train"}),
        ("1ABC_chainA.pdb", set()),
        ("6NEW.pdb", set()),
    ],
)
def test_a_structure_is_found_by_file_or_id(manifest, structure, parts):
    assert read_split(manifest).parts_of(structure) == parts


def test_structures_of_the_part_pass(manifest):
    check_split(["a/1ABC.pdb.gz", "5DUP"], manifest, "train")
    check_split(["2xyz.cif"], manifest, "validation")
    check_split(["a/3DEF.pdb"], str(manifest), "test")


@pytest.mark.parametrize(
    ("structures", "part", "message"),
    [
        (
            ["1ABC.pdb", "2XYZ.cif"],
            "train",
            r"1 of 2 structures are not of part 'train': 2XYZ.cif \(validation\); leav",
        ),
        (["3DEF"], "train", r"1 of 1 structures are not of part 'train': 3DEF \(test\)"),
        (["1ABC.pdb"], "test", r"not of part 'test': 1ABC.pdb \(train\)"),
        (["6NEW.pdb"], "train", r"6NEW.pdb \(not listed\)"),
        (["4AMB.pdb"], "train", r"4AMB.pdb \(test and train\)"),  # one of the two may be the one that was tested on
        (
            [f"{i}.pdb" for i in range(9)],
            "train",
            r"9 of 9 .*: 0.pdb \(not listed\), .*4.pdb \(not listed\), \.\.\.; leave",
        ),
        (["1ABC.pdb"], "trian", "no structure is of part 'trian'; its parts are test, train, validation"),
    ],
)
def test_all_others_are_refused_in_one_line(manifest, structures, part, message):
    with pytest.raises(InputError, match=f"manifest.csv: .*{message}") as caught:
        check_split(structures, manifest, part)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing, expected a CSV table with the columns id, file, split"),
        (b"name,file,part\na,b,c\n", "begins with name, file, part, expected a CSV table with the columns id, file"),
        (b"id,file,split\n", "lists no structures, expected a row for each"),
        (b"id,file,split\n,,\n", "lists no structures, expected a row for each"),
        (b"\xff\xfe\x00a", "no CSV table .*expected one with the columns id, file, split"),
        (b"id,file,split\na," + b"x" * 200_000 + b",train\n", "no CSV table .*field larger than field limit"),
    ],
)
def test_what_is_no_such_table(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"bad.csv: {message}"):
        read_split(path)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="none.csv: cannot be read: No such file or directory"):
        check_split(["a"], tmp_path / "none.csv", "train")


def test_a_row_that_is_cut_short_is_of_no_part(tmp_path):
    """Also with the mark that spreadsheets put in front, and Windows' line ends."""
    path = tmp_path / "short.csv"
    path.write_bytes(b"\xef\xbb\xbfid,file,split\r\n1ABC,1ABC.pdb\r\n2XYZ,2XYZ.pdb,train\r\n")
    check_split(["2XYZ.pdb"], path, "train")
    with pytest.raises(InputError, match=r"1 of 1 structures are not of part 'train': 1ABC.pdb"):
        check_split(["1ABC.pdb"], path, "train")
