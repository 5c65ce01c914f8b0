#!/bin/sh
# PID 1 of the nested lane: loads KVM, shows the outer machine's files under a layer of memory, runs one
# command there and reports its exit status.
#
# 9p share "lane": command (a shell script), shares (a directory a line, shared writable as share0,
# share1, ...), kvm-amd (module parameters).
# virtio ports: in, out, err: the command's; status: "exit N"; pulse0, pulse1, ...: a byte now and
# then, each on a device of its own.
export PATH=/bin
fail() { echo "lane: $*"; [ -e /run/status ] && echo "fail $*" >&3; sleep 1; poweroff -f; }

mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
plan9() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=1048576,$3" "$1" "$2"; }
mkdir -p /run/lane /run/lower /run/layer
while read -r module; do
    # The lane's parameters come by 9p, which is loaded before KVM.
    [ "$module" = kvm_amd ] && { plan9 lane /run/lane ro || fail "no 9p share"; read -r parameters </run/lane/kvm-amd; }
    # shellcheck disable=SC2086 # one word each
    if [ "$module" = kvm_amd ]; then insmod /modules/kvm_amd.ko $parameters; else insmod "/modules/$module.ko"; fi ||
        fail "module $module cannot be loaded"
done </modules/order

# A port's device appears under its number; its name is in sysfs, a moment after the driver.
port() {
    while :; do
        for port in /sys/class/virtio-ports/*; do
            [ "$(cat "$port/name" 2>/dev/null)" = "$1" ] && { echo "/dev/${port##*/}"; return; }
        done
        sleep 0.05
    done
}
exec 3>"$(port status)"
: >/run/status

# A software processor loses an interrupt now and then: at each #VMEXIT, QEMU 10.0 changes the word of what
# is pending without the lock that other threads set it under (do_vmexit in svm_helper.c; mended later by
# "treewide: clear bits of cs->interrupt_request with cpu_reset_interrupt()"). With a timer's interrupt
# all timers of the processor are lost, until another interrupt makes its APIC look again. So one comes
# from outside, to each processor its own: a processor that waits for another is woken no less.
for cpu in $(seq 0 $(($(nproc) - 1))); do
    pulse=$(port "pulse$cpu")
    # .../0000:00:05.0/virtio4/virtio-ports/vport4p1
    device=$(readlink -f "/sys/class/virtio-ports/${pulse#/dev/}")
    for interrupt in "${device%/virtio*/virtio-ports/*}"/msi_irqs/*; do
        echo "$cpu" >"/proc/irq/${interrupt##*/}/smp_affinity_list" || fail "interrupt ${interrupt##*/} stays where it is"
    done
    cat "$pulse" >/dev/null 3>&- &
done

# The outer machine's / below, memory on top: everything can be written, nothing stays.
root=/run/root
mkdir $root
plan9 host /run/lower ro,cache=loose || fail "/ cannot be mounted"
mount -t tmpfs -o size=90% layer /run/layer
mkdir /run/layer/upper /run/layer/work
mount -t overlay -o lowerdir=/run/lower,upperdir=/run/layer/upper,workdir=/run/layer/work lane $root ||
    fail "/ cannot be layered"
mount -t proc proc $root/proc
mount -t sysfs sysfs $root/sys
mount -t devtmpfs devtmpfs $root/dev
mkdir -p $root/dev/pts $root/dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts $root/dev/pts
# Guests may be larger than the lane, as long as they do not use it.
mount -t tmpfs -o mode=1777,size=8g shm $root/dev/shm
mount -t tmpfs -o mode=755 run $root/run
mkdir $root/run/lane
mount --bind /run/lane $root/run/lane
ln -sf /proc/self/fd $root/dev/fd
for number in 0 1 2; do
    set -- stdin stdout stderr
    shift $number
    ln -sf /proc/self/fd/$number "$root/dev/$1"
done
number=0
while read -r share; do
    mkdir -p "$root$share"
    plan9 "share$number" "$root$share" rw,cache=mmap || fail "$share cannot be shared"
    number=$((number + 1))
done </run/lane/shares
hostname lane
ip link set lo up

# A port can be opened once only, so programs get pipes: they may open /dev/stdout again. A pipe's end is
# opened for both directions first, because each direction alone would wait for the other.
in=$(port in) out=$(port out) err=$(port err)
mkfifo /run/in /run/out /run/err
exec 9<>/run/in 4</run/in 5>/run/in 9>&-
cat "$in" >&5 3>&- 4<&- &
exec 5>&-
exec 9<>/run/out 5</run/out 6>/run/out 9>&-
cat <&5 >"$out" 3>&- 4<&- 6>&- &
out=$!
exec 9<>/run/err 5</run/err 7>/run/err 9>&-
cat <&5 >"$err" 3>&- 4<&- 6>&- 7>&- &
err=$!
exec 5<&-
setsid chroot $root /bin/sh /run/lane/command <&4 >&6 2>&7 3>&- 4<&- 6>&- 7>&-
status=$?
exec 4<&- 6>&- 7>&-
# What the command left behind may hold the pipes open: it gets two seconds to end.
(sleep 2; kill $out $err) 3>&- &
wait $out
wait $err
sync
echo "exit $status" >&3
sleep 1
poweroff -f
