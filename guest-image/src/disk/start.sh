#!/bin/sh
# Starts the system.
export PATH=/bin
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
hostname -F /etc/hostname
network dhcp
# It makes its keys when the first client comes.
dropbear -R
