#!/bin/bash
# PID 1 of the testbed: sets the machine up, says "ready", waits for "go", runs the command, says how it ended.
#
# Talks with xtask over virtio-serial ports: caisson.control has lines both ways, caisson.stdout and caisson.stderr
# carry the command's output.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux LANG=C.UTF-8
cmdline=" $(cat /proc/cmdline) "
say() { echo "caisson-testbed: $*" >/dev/console; }

mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm /dev/mqueue /dev/hugepages /run/lock
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t hugetlbfs hugetlbfs /dev/hugepages
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t securityfs securityfs /sys/kernel/security
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/fd/0 /dev/stdin
ln -sfn /proc/self/fd/1 /dev/stdout
ln -sfn /proc/self/fd/2 /dev/stderr
mount --make-rshared /

# Control groups, as systemd has them.
cgroup=/sys/fs/cgroup
case $cmdline in
*' caisson.cgroup=v1 '*)
    # Version 1's hierarchies, and one of version 2 beside them, without controllers.
    mount -t tmpfs -o mode=755 cgroup $cgroup
    mkdir $cgroup/unified $cgroup/systemd
    mount -t cgroup2 -o nsdelegate cgroup2 $cgroup/unified
    mount -t cgroup -o none,xattr,name=systemd cgroup $cgroup/systemd
    for controllers in cpuset cpu,cpuacct blkio memory devices freezer net_cls,net_prio perf_event hugetlb pids rdma \
        misc; do
        mkdir $cgroup/$controllers
        mount -t cgroup -o $controllers cgroup $cgroup/$controllers || say "no controllers $controllers"
        for controller in ${controllers/,/ }; do
            [ -e $cgroup/$controller ] || ln -s $controllers $cgroup/$controller
        done
    done
    ;;
*)
    # Nobody lives in the root, and every controller is on for those below it.
    mount -t cgroup2 -o nsdelegate cgroup2 $cgroup
    mkdir -p $cgroup/init.scope
    echo 1 >$cgroup/init.scope/cgroup.procs
    for controller in $(cat $cgroup/cgroup.controllers); do
        echo "+$controller" >$cgroup/cgroup.subtree_control
    done
    ;;
esac

modprobe -a kvm_amd overlay 9pnet_virtio 9p vhost_vsock vhost_net tun veth bridge br_netfilter nf_tables loop ||
    say 'some modules are missing'
for cpu in /sys/devices/system/cpu/cpu[1-9]*/online; do
    [ -e "$cpu" ] && echo 1 >"$cpu"
done
ip link set lo up
hostname testbed
echo 1 >/proc/sys/net/ipv4/ip_forward
ulimit -n 1048576

mkdir -p /scratch
mount -t ext4 -o rw,noatime /dev/vdb /scratch

port() { # the device of the virtio-serial port of this name
    local name
    for name in /sys/class/virtio-ports/*/name; do
        [ "$(cat "$name")" = "$1" ] && echo "/dev/$(basename "$(dirname "$name")")" && return
    done
    say "there is no port $1"
}
exec 9<>"$(port caisson.control)"
echo "ready $(uname -r) cpus=$(nproc) kvm=$([ -c /dev/kvm ] && echo yes || echo no)" >&9
read -r go now <&9
[ "$go" = go ] || say "expected go, got $go"
date --set="@$now" >/dev/null

# Shares come last: a machine with a 9p mount can't be saved.
for share in /sys/bus/virtio/drivers/9pnet_virtio/virtio*/mount_tag; do
    tag=$(tr -d '\0' <"$share")
    case $tag in
    exchange) at=/exchange mode=rw,cache=mmap ;;
    *) at=/$tag mode=ro,cache=loose ;;
    esac
    mkdir -p "$at"
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$mode" "$tag" "$at" || say "mounting $at failed"
done
cd /workspace || cd /

case $cmdline in
*' caisson.shell '*)
    say 'a shell on the console; its end is the end of the machine'
    setsid --ctty bash --login </dev/hvc0 >/dev/hvc0 2>&1
    code=$?
    ;;
*)
    # The command gets pipes, as under any caller: it may reopen /dev/stdout, which a port does not allow.
    mkfifo /run/caisson-testbed/stdout /run/caisson-testbed/stderr
    cat /run/caisson-testbed/stdout >"$(port caisson.stdout)" &
    pumps=$!
    cat /run/caisson-testbed/stderr >"$(port caisson.stderr)" &
    pumps="$pumps $!"
    # Says that the machine lives. It waits on a pipe that stays empty, so that no processes come and go.
    mkfifo /run/caisson-testbed/never
    (while ! read -rt 10 _ <>/run/caisson-testbed/never; do echo alive >&9; done) &
    heart=$!
    setsid bash /job/job </dev/null >/run/caisson-testbed/stdout 2>/run/caisson-testbed/stderr 9>&-
    code=$?
    kill $heart
    # A daemon that the command left behind may hold the pipes open: what it says later is not waited for.
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        kill -0 $pumps 2>/dev/null || break
        sleep 0.1
    done
    ;;
esac
sync
echo "exit $code" >&9
# xtask ends the machine when it has read the line above.
sleep 60
echo o >/proc/sysrq-trigger
sleep 60
