#!/bin/sh
# PID 1 of the Linux guest. Words behind "--" on the kernel's command line arrive as arguments: each is
# run as a shell command before the shell starts, so that a test can say what it wants:
#   console=ttyS0 quiet -- "nproc; poweroff -f"
export PATH=/bin HOME=/root TERM="${TERM:-linux}"
mount -t devtmpfs devtmpfs /dev
# The first line comes before all that takes time: it is what a boot is measured by.
echo "rhyve-init: up"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
while read -r module; do
    insmod "/modules/$module.ko"
done </modules/order
hostname rhyve
ip link set lo up
for command; do
    eval "$command"
done
cd "$HOME"
while :; do
    # A session of its own on the real console, for job control.
    setsid cttyhack sh -l
done
