#!/bin/busybox sh
# The testbed's initramfs: loads the modules for the disks, mounts the root, hands over to init.sh.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
echo 'caisson-testbed: user space' >/dev/console
for module in $($b cat /modules/order); do
    $b insmod "/modules/$module" || echo "caisson-testbed: insmod $module failed" >/dev/console
done
$b mount -t ext4 -o rw,noatime /dev/vda /newroot || echo 'caisson-testbed: no root' >/dev/console
# A kernel that is not the root's own brings its modules along.
[ -d /along ] && $b cp -r /along/. /newroot/usr/lib/modules/
$b mount --move /dev /newroot/dev
$b mount --move /proc /newroot/proc
$b mount -t tmpfs -o mode=755 run /newroot/run
$b mkdir /newroot/run/caisson-testbed
$b cp /init.sh /newroot/run/caisson-testbed/init.sh
exec $b switch_root /newroot /run/caisson-testbed/init.sh
