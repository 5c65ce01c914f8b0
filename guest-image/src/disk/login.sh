#!/bin/sh
# A login on the console that the kernel uses: the last of those it names.
read -r consoles </sys/class/tty/console/active
exec getty -L 0 "${consoles##* }" "${TERM:-linux}"
