"""How records become plain arrays and back, one codec per file, encode beside decode.

Every codec turns records into named arrays that stock zarr stores and reads; their meaning is documented in
each module and in docs/cache-format.md.
"""
