# Sourced: `stamp` is a checksum of everything that a check on a GPU depends on in this source tree,
# so that what passed in an earlier call is not run again, and is run again after any change.
stamp=$(cd "$root" && find fastdean csrc tests -type f -regex '.*\.\(py\|cpp\|cu\|cuh\|h\)' -print0 |
    sort -z | xargs -0 cksum | cksum | cut -d ' ' -f 1)
