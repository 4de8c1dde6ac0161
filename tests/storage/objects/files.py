"""Tests of the contract of a store. For a new store, subclass `FilesTests` and define the fixture `files`."""

import threading

import pytest


class FilesTests:
    """Subclasses have a fixture `files`: an empty store, whose root need not exist yet."""

    def test_an_empty_store(self, files):
        assert files.read("a/b") is None
        assert not files.exists("a/b")
        assert files.names() == files.names("a") == []
        assert files.sizes() == {}
        assert files.folders("a") == []
        assert files.free_bytes() > 0
        files.check_writable()
        files.delete("a/b")
        files.delete_tree("a")
        assert files.delete_partials() == []

    def test_create_only_if_absent(self, files):
        assert files.create("a/b", b"first")
        assert not files.create("a/b", b"second")
        assert files.read("a/b") == b"first"
        assert files.exists("a/b")
        assert not files.exists("a")
        assert files.read("a") is None  # a folder is no object
        assert files.names() == ["a/b"]

    def test_an_object_may_be_empty(self, files):
        assert files.create("a", b"")
        assert files.read("a") == b""
        assert files.sizes() == {"a": 0}
        assert not files.create("a", b"1")

    def test_of_many_creators_one_wins(self, files):
        barrier, wins = threading.Barrier(8), []

        def race(i):
            barrier.wait()
            if files.create("object", bytes([i]) * 100_000):
                wins.append(i)

        threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert files.read("object") == bytes(wins) * 100_000
        assert files.names() == ["object"]

    def test_write_sync_list_delete(self, files):
        files.write("shards/0-a/x/c/0", b"12")
        files.write("shards/0-a/zarr.json", b"1")
        files.write("shards/1-a/zarr.json", b"1")
        with pytest.raises(FileExistsError):
            files.write("shards/0-a/zarr.json", b"2")
        files.sync_tree("shards/0-a")
        files.sync_names(["shards/0-a/zarr.json"])
        assert files.sizes("shards/0-a") == {"shards/0-a/x/c/0": 2, "shards/0-a/zarr.json": 1}
        assert files.folders("shards") == ["shards/0-a", "shards/1-a"]
        files.delete_tree("shards/0-a")
        files.delete_tree("shards/0-a")
        assert files.names() == ["shards/1-a/zarr.json"]
        assert files.folders("shards") == ["shards/1-a"]

    def test_replace_and_delete(self, files):
        files.create("manifest.json", b"damaged")
        files.replace("manifest.json", b"whole")
        assert files.read("manifest.json") == b"whole"
        assert files.names() == ["manifest.json"]
        files.delete("manifest.json")
        files.delete("manifest.json")
        assert files.read("manifest.json") is None
        assert files.create("manifest.json", b"again")

    def test_names_are_sorted_and_of_the_folder_alone(self, files):
        for name in ("index/2", "index/10", "index2/1", "a"):
            files.create(name, name.encode())
        assert files.names() == ["a", "index/10", "index/2", "index2/1"]
        assert files.names("index") == ["index/10", "index/2"]

    @pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd"])
    def test_names_do_not_lead_outside(self, files, name):
        for call in (files.read, files.exists, files.delete, files.delete_tree):
            with pytest.raises(ValueError, match="leads outside"):
                call(name)
        for call in (files.create, files.write, files.replace):
            with pytest.raises(ValueError, match="leads outside"):
                call(name, b"")

    def test_the_whole_cache_is_never_deleted(self, files):
        files.create("a", b"1")
        with pytest.raises(ValueError, match="refusing to delete the whole cache"):
            files.delete_tree("")
        assert files.names() == ["a"]

    def test_messages_name_objects_in_full(self, files):
        assert files.where("index/000000.parquet") == f"{files.root}/index/000000.parquet"
