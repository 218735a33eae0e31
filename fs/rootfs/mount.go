package rootfs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountSource is what mountinfo shows as the device of a rootfs, by which it is known again.
const mountSource = "lazuli"

// attachLoop makes image a read-only loop device, which goes away with its last user, and returns it open.
// Not a file-backed mount: that would be a level of stacking more.
func attachLoop(image string) (*os.File, error) {
	backing, err := os.Open(image)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("no loop devices: %w", err)
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(backing.Fd())}
	config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
	copy(config.Info.File_name[:len(config.Info.File_name)-1], filepath.Base(image))
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("no free loop device: %w", err)
		}
		name := "/dev/loop" + strconv.Itoa(n)
		device, err := os.OpenFile(name, os.O_RDONLY, 0)
		if errors.Is(err, os.ErrNotExist) { // a container's /dev has only those that were there when it started
			unix.Mknod(name, unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(n))))
			device, err = os.OpenFile(name, os.O_RDONLY, 0)
		}
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		if err == nil {
			return device, nil
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) { // somebody else was faster
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
}

// mountEROFS mounts a metadata image at dir.
func mountEROFS(image, dir string) error {
	device, err := attachLoop(image)
	if err != nil {
		return fmt.Errorf("metadata image %s: %w", image, err)
	}
	defer device.Close() // the mount keeps it
	if err := unix.Mount(device.Name(), dir, "erofs", unix.MS_RDONLY|unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount metadata image %s: %w", image, err)
	}
	return nil
}

// overlay says what a rootfs is made of: folders, Upper and Work empty for a read-only one.
type overlay struct {
	meta, objects, server string
	upper, work           string
	durable               bool // what is written is kept
}

// mountOverlay puts the parts together at dir.
//
// It is mount(2), not the newer fsconfig(2), whose strings end at 255 bytes; the paths are three in one option.
func mountOverlay(o overlay, dir string) error {
	options := []string{"lowerdir=" + escape(o.meta) + "::" + escape(o.objects) + "::" + escape(o.server), "metacopy=on"}
	flags := uintptr(unix.MS_NOATIME)
	if o.upper != "" {
		options = append(options, "redirect_dir=on", "upperdir="+escape(o.upper), "workdir="+escape(o.work))
		if !o.durable {
			options = append(options, "volatile") // it is thrown away, so nobody need wait for the disk
		}
	} else {
		options = append(options, "redirect_dir=follow")
		flags |= unix.MS_RDONLY
	}
	err := unix.Mount(mountSource, dir, "overlay", flags, strings.Join(options, ","))
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("mount overlayfs at %s: %w: the kernel log says why; lazuli doctor tries what is needed", dir, err)
	}
	if err != nil {
		return fmt.Errorf("mount overlayfs at %s: %w", dir, err)
	}
	return nil
}

// likeRoot gives the upper folder the owner, mode and time of the image's root, which it hides.
func likeRoot(upper, root string) error {
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return err
	}
	if err := os.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(upper, st.Mode&0o7777); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, upper, []unix.Timespec{st.Mtim, st.Mtim}, 0)
}

// escape writes a path as a value among mount options, where a comma would end it, or a colon in lowerdir.
func escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`).Replace(path)
}

// unmount unmounts dir; if it is in use, its users keep it until they are done.
func unmount(dir string) error {
	err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // not mounted
		return nil
	}
	return err
}

// A mountPoint is one line of mountinfo.
type mountPoint struct {
	id             int
	dir            string
	fstype, source string
	options        string // of the file system
}

// mountPoints returns what is mounted, in the order in which it was. See proc_pid_mountinfo(5).
func mountPoints() ([]mountPoint, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []mountPoint
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 {
			continue
		}
		id, _ := strconv.Atoi(fields[0])
		m := mountPoint{id: id, dir: unescape(fields[4])}
		for i := 6; i+2 < len(fields); i++ {
			if fields[i] == "-" {
				m.fstype, m.source, m.options = fields[i+1], unescape(fields[i+2]), unescape(strings.Join(fields[i+3:], " "))
				break
			}
		}
		points = append(points, m)
	}
	return points, nil
}

// unescape undoes the kernel's octal escapes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
