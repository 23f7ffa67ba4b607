# What a program file says of itself. Sourced.

# A number in a file: its offset and its length in bytes, in this machine's order.
number_at() {
  od -An -v -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '
}

# Whether a program is started by a loader of the system's: one of its program headers is a PT_INTERP, which is 3 (`elf(5)`,
# 64 bits). A static program can have the loader's name in it all the same, as text.
names_loader() {
  header=$(number_at "$1" 32 8) size=$(number_at "$1" 54 2) left=$(number_at "$1" 56 2)
  while [ "$left" -gt 0 ]; do
    [ "$(number_at "$1" "$header" 4)" != 3 ] || return 0
    header=$((header + size)) left=$((left - 1))
  done
  return 1
}
