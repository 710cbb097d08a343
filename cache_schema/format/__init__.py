"""The cache on disk: records, codecs, manifest, shards, store, writer and reader."""
