#!/bin/sh
# PID 1 of the Linux guest. Words behind "--" on the kernel's command line arrive as arguments: each is
# run as a shell command before the shell starts, so that a test can say what it wants:
#   console=ttyS0 quiet -- "nproc; poweroff -f"
# ip=dhcp and ip=ADDRESS/BITS set its network up (network.sh).
# With root=DEVICE (ext4) the system on that disk takes over instead of the shell.
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
network off
for command; do
    eval "$command"
done
root=$(sed -n 's/.*\broot=\([^ ]*\).*/\1/p' /proc/cmdline)
if [ -n "$root" ]; then
    mkdir /sysroot
    # The driver may not have found it yet.
    tries=100
    until [ -b "$root" ] || [ $((tries -= 1)) = 0 ]; do sleep 0.1; done
    if mount -t ext4 "$root" /sysroot; then
        umount /dev/pts /dev/shm /tmp
        for dir in dev proc sys; do mount --move /$dir /sysroot/$dir; done
        exec switch_root /sysroot /bin/init
    fi
    echo "rhyve-init: no root on $root"
fi
cd "$HOME"
while :; do
    # A session of its own on the real console, for job control.
    setsid cttyhack sh -l
done
