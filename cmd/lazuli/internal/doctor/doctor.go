// Package doctor finds out whether a machine can start containers lazily, and
// what it lacks.
//
// What can be tried is tried, since versions and configurations do not tell
// whether a kernel was built with something: the overlay with data-only lower layers is
// really mounted, in a mount namespace that nobody else sees and that ends with the attempt.
package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"lazuli/fs/bundle"
)

// A Finding is what one check found.
type Finding struct {
	Name     string `json:"name"`
	OK       bool   `json:"ok"`
	Required bool   `json:"required"`      // a lazy start does not work without
	Detail   string `json:"detail"`        // what is here, or what is wrong
	Fix      string `json:"fix,omitempty"` // how to get it, if not OK
}

// Examine makes all checks, for a root folder at root, which need not exist.
func Examine(root string) []Finding {
	release, major, minor := kernel()
	since := func(wantMajor, wantMinor int) bool {
		return major > wantMajor || major == wantMajor && minor >= wantMinor
	}
	return []Finding{
		{"kernel", since(6, 5), true, fmt.Sprintf("Linux %s (6.5 has overlayfs with data-only layers)", release), "boot Linux 6.5 or newer; on Debian 12: apt-get install -t bookworm-backports linux-image-amd64"},
		check("privileges", true, isRoot, "run as root: mounting EROFS and overlayfs needs it (sudo lazuli doctor)"),
		check("fuse", true, fuse, "modprobe fuse; in a container: give it /dev/fuse"),
		check("erofs", true, erofs, "modprobe erofs; on Ubuntu: apt-get install linux-modules-extra-$(uname -r)"),
		check("loop", true, loop, "modprobe loop; in a container: give it /dev/loop-control and /dev/loop*"),
		check("overlayfs", true, dataOnly, "modprobe overlay; it needs Linux 6.5 and root"),
		check("root folder", true, func() (string, error) { return folder(root) }, "choose another with --root, on ext4, xfs, btrfs or tmpfs"),
		check("runtime", true, ociRuntime, "apt-get install runc"),
		check("cgroups", true, cgroups, "mount -t cgroup2 cgroup2 /sys/fs/cgroup"),
		{"resend", since(6, 9), false, "FUSE requests survive a restart of their server from Linux 6.9 on", "boot Linux 6.9 or newer; until then, reads that wait when the server is killed fail"},
	}
}

// Works reports whether nothing that is required is missing.
func Works(findings []Finding) bool {
	for _, f := range findings {
		if f.Required && !f.OK {
			return false
		}
	}
	return true
}

func check(name string, required bool, try func() (detail string, err error), fix string) Finding {
	detail, err := try()
	if os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission) {
		fix = "run as root"
	}
	if err != nil {
		return Finding{name, false, required, err.Error(), fix}
	}
	return Finding{Name: name, OK: true, Required: required, Detail: detail}
}

func kernel() (release string, major, minor int) {
	var u unix.Utsname
	unix.Uname(&u) // cannot fail
	release = unix.ByteSliceToString(u.Release[:])
	fmt.Sscanf(release, "%d.%d", &major, &minor)
	return release, major, minor
}

func isRoot() (string, error) {
	if uid := os.Geteuid(); uid != 0 {
		return "", fmt.Errorf("user id %d", uid)
	}
	// Root of a container may still lack it.
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return "", err
	}
	if data[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return "", errors.New("root without CAP_SYS_ADMIN")
	}
	return "root, so fusermount is not needed", nil
}

func fuse() (string, error) {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	return "/dev/fuse", f.Close()
}

func erofs() (string, error) {
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && f[len(f)-1] == "erofs" {
			return "in the kernel", nil
		}
	}
	// The kernel loads it by itself at the first mount.
	if err := exec.Command("modprobe", "--dry-run", "erofs").Run(); err != nil {
		return "", errors.New("neither in /proc/filesystems nor a module that can be loaded")
	}
	return "a module that can be loaded", nil
}

func loop() (string, error) {
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	n, err := unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return "", fmt.Errorf("/dev/loop-control: no free device: %w", err)
	}
	return fmt.Sprintf("/dev/loop%d is free", n), nil
}

// dataOnly mounts an overlay whose file has its name in one lower layer and its
// bytes in a data-only one, and reads it.
func dataOnly() (string, error) {
	dir, err := os.MkdirTemp("", "lazuli-doctor-")
	if err != nil {
		return "", err
	}
	defer os.Remove(dir)
	if err := onThread(func() error { return tryDataOnly(dir) }); err != nil {
		return "", err
	}
	return "data-only lower layers work (tried)", nil
}

// onThread runs f on a thread that ends with it, and with the thread its mount namespace and all that was
// mounted there. The process's first thread would not end, and it is what /proc/self shows: it is left alone.
func onThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // but for the first thread never unlocked
		if unix.Gettid() == unix.Getpid() {
			result <- onThread(f)
			runtime.UnlockOSThread()
			return
		}
		result <- f()
	}()
	return <-result
}

func tryDataOnly(dir string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("a private mount namespace: %w", err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		return fmt.Errorf("tmpfs: %w", err)
	}
	meta, data, merged := filepath.Join(dir, "meta"), filepath.Join(dir, "data"), filepath.Join(dir, "merged")
	for _, d := range []string{meta, data, merged} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	const content = "bytes"
	file := filepath.Join(meta, "file")
	if err := errors.Join(
		os.WriteFile(filepath.Join(data, "object"), []byte(content), 0o644),
		os.WriteFile(file, nil, 0o644),
		os.Truncate(file, int64(len(content))),
		unix.Setxattr(file, "trusted.overlay.metacopy", nil, 0),
		unix.Setxattr(file, "trusted.overlay.redirect", []byte("/object"), 0),
	); err != nil {
		return err
	}
	options := "lowerdir=" + meta + "::" + data + ",metacopy=on,redirect_dir=follow"
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, options); err != nil {
		return fmt.Errorf("mounting with a data-only lower layer: %w", err)
	}
	got, err := os.ReadFile(filepath.Join(merged, "file"))
	if err != nil {
		return fmt.Errorf("reading through a data-only lower layer: %w", err)
	}
	if string(got) != content {
		return fmt.Errorf("reading through a data-only lower layer: got %q, want %q", got, content)
	}
	return nil
}

// folder looks at the file system that root is, or will be, on.
func folder(root string) (string, error) {
	dir, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	var st unix.Statfs_t
	for {
		err := unix.Statfs(dir, &st)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.ENOENT) || dir == "/" {
			return "", fmt.Errorf("%s: %w", dir, err)
		}
		dir = filepath.Dir(dir)
	}
	if st.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return "", fmt.Errorf("%s is on overlayfs, which cannot hold a writable layer", root)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return "", fmt.Errorf("%s is on a read-only file system", root)
	}
	return fmt.Sprintf("%s, %.1f GB free", root, float64(st.Bavail)*float64(st.Bsize)/1e9), nil
}

func ociRuntime() (string, error) {
	bin, err := bundle.Runtime()
	if err != nil {
		return "", errors.New("neither runc nor crun is in PATH")
	}
	out, err := exec.Command(bin, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", bin, err)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	return bin + ", " + first, nil
}

func cgroups() (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		return "", fmt.Errorf("/sys/fs/cgroup: %w", err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return "version 2", nil
	}
	if dirs, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs"); len(dirs) == 0 {
		return "", errors.New("/sys/fs/cgroup: no cgroup is mounted there")
	}
	return "version 1", nil
}
