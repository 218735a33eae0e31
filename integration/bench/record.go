package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// A job is what an image runs, in a folder with all that the image has, without a container.
type job struct {
	root   string
	config *v1.Config
}

// unpack makes the folder of an image. It stays mounted.
func (w *world) unpack(ctx context.Context, im image) (*job, error) {
	if j := w.jobs[im.Name]; j != nil {
		return j, nil
	}
	img, err := openLayout(im.Dir)
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(w.Work, "plain", im.Name)
	j := &job{dir + "/root", &config.Config}
	for _, d := range []string{j.root, dir + "/upper", dir + "/work"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	lower, err := output(ctx, w.Peers, "unpack", im.Dir, dir+"/layers")
	if err != nil {
		return nil, err
	}
	for _, m := range []struct{ kind, at, options string }{
		{"overlay", j.root, strings.TrimSpace(lower) + ",upperdir=" + dir + "/upper,workdir=" + dir + "/work"},
		{"proc", j.root + "/proc", ""},
		{"tmpfs", j.root + "/tmp", ""},
	} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, m.options); err != nil {
			return nil, fmt.Errorf("mount %s at %s: %w", m.kind, m.at, err)
		}
	}
	w.jobs[im.Name] = j
	return j, nil
}

// command returns the command that runs the job.
func (j *job) command() *exec.Cmd {
	// env looks the program up where the image has it, not where this machine has it.
	c := exec.Command("/usr/bin/env", slices.Concat([]string{"--"}, j.config.Entrypoint, j.config.Cmd)...)
	c.SysProcAttr = &syscall.SysProcAttr{Chroot: j.root}
	c.Dir, c.Env = "/"+strings.TrimPrefix(j.config.WorkingDir, "/"), j.config.Env
	return c
}

// record runs an image's job and returns the files that it opens, in the order in which it does so first, as paths without a
// slash at the beginning.
func record(ctx context.Context, w *world, im image) ([]string, error) {
	say("recording what the job of %s opens", im.Name)
	j, err := w.unpack(ctx, im)
	if err != nil {
		return nil, err
	}
	// Nobody reads events while the job runs: the kernel keeps them, without a limit.
	events, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_NONBLOCK|unix.FAN_CLOEXEC|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fanotify: %w", err)
	}
	defer unix.Close(events)
	if err := unix.FanotifyMark(events, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN|unix.FAN_OPEN_EXEC, unix.AT_FDCWD, j.root); err != nil {
		return nil, fmt.Errorf("fanotify of %s: %w", j.root, err)
	}
	if err := finish(ctx, j.command(), io.Discard); err != nil {
		return nil, err
	}
	list, err := opened(events, j.root)
	if err == nil && len(list) == 0 {
		err = errors.New("no file was opened")
	}
	return list, err
}

// opened reads what there is of events and returns the paths below root, each once.
func opened(events int, root string) (list []string, err error) {
	seen := map[string]bool{}
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(events, buf)
		if err == unix.EAGAIN {
			return list, nil
		}
		if err != nil {
			return list, fmt.Errorf("fanotify: %w", err)
		}
		// struct fanotify_event_metadata: length 4, version 1, reserved 1, its own length 2, mask 8, descriptor 4, process 4.
		for b := buf[:n]; len(b) >= 24; b = b[binary.NativeEndian.Uint32(b):] {
			fd := int(int32(binary.NativeEndian.Uint32(b[16:])))
			if fd < 0 {
				return list, errors.New("fanotify: events were lost")
			}
			path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			unix.Close(fd)
			if err != nil {
				return list, err
			}
			if path, ok := strings.CutPrefix(path, root+"/"); ok && !seen[path] && !strings.HasSuffix(path, " (deleted)") {
				seen[path] = true
				list = append(list, path)
			}
		}
	}
}

// list returns the name of a file with a list of files of an image for the program read, which have so many percent of the bytes of all: which
// ones is a matter of their paths' hashes, and their order is that of a walk.
func (w *world) list(ctx context.Context, im image, percent int) (string, error) {
	name := filepath.Join(w.Work, fmt.Sprintf("%s.%d.list", im.Name, percent))
	if _, err := os.Stat(name); err == nil {
		return name, nil
	}
	j, err := w.unpack(ctx, im)
	if err != nil {
		return "", err
	}
	if len(j.config.Entrypoint) > 0 {
		return "", fmt.Errorf("image %s has an entrypoint, in the place of which no other job can be run: leave out the modes %s", im.Name, read)
	}
	sizes := map[string]int64{}
	inodes := map[uint64]bool{}
	var total int64
	err = filepath.WalkDir(j.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		path = strings.TrimPrefix(path, j.root)
		if d.IsDir() && slices.Contains([]string{"/proc", "/sys", "/dev", "/run", "/tmp"}, path) { // in a container they are others
			return fs.SkipDir
		}
		if !d.Type().IsRegular() || strings.Contains(path, "\n") {
			return nil
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		if ino := fi.Sys().(*syscall.Stat_t).Ino; fi.Size() > 0 && !inodes[ino] {
			inodes[ino] = true
			sizes[path] = fi.Size()
			total += fi.Size()
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	paths := slices.Collect(maps.Keys(sizes))
	byHash(paths)
	var sum int64
	n := 0
	for ; n < len(paths) && sum < total*int64(percent)/100; n++ {
		sum += sizes[paths[n]]
	}
	paths = paths[:n]
	slices.SortFunc(paths, func(a, b string) int { return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/")) })
	return name, os.WriteFile(name, fmt.Appendf(nil, "%d\n%s\n", sum, strings.Join(paths, "\n")), 0o644)
}
