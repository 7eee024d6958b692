# Sourced: `stamp` is a checksum of everything that a check on a GPU depends on, so that what passed
# in an earlier call is not run again, and is run again after any change: the sources, the tests and
# their settings, and `found`, the line of prerequisites.py with the versions and the GPU's name.
stamp=$(cd "$root" && {
    echo "$found"
    find fastdean csrc tests benchmarks/gpu CMakeLists.txt pyproject.toml -type f \
        -regex '.*\.\(py\|cpp\|cu\|cuh\|h\|sh\|txt\|toml\)' -print0 | sort -z | xargs -0 cksum
} | cksum | cut -d ' ' -f 1)
