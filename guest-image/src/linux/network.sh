#!/bin/sh
# Sets the network up. Words on the kernel's command line say how:
#   ip=ADDRESS/BITS[,GATEWAY]   of eth0; of eth1 by ip1=, and so on
#   ip=dhcp                     ask for an address
#   ip=off                      leave it alone
# The argument counts for an interface of which nothing is said.
# The initramfs does it and then the disk: the second time changes nothing.
ip link set lo up
for device in /sys/class/net/eth*; do
    [ -e "$device" ] || continue
    interface=${device##*/}
    number=${interface#eth}
    [ "$number" = 0 ] && number=
    address=$1
    for word in $(cat /proc/cmdline); do
        case $word in "ip$number="*) address=${word#*=} ;; esac
    done
    case $address in
    dhcp)
        ip link set "$interface" up
        udhcpc -i "$interface" -s /bin/dhcp-event -b -S >/dev/null 2>&1 &
        ;;
    */*)
        ip link set "$interface" up
        ip addr replace "${address%%,*}" dev "$interface"
        case $address in *,*) ip route replace default via "${address#*,}" ;; esac
        ;;
    esac
done
