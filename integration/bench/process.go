package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a program may take until it answers, which is a second on a quiet machine.
const patience = time.Minute

// A process is a program that runs beside this one.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
}

// startProcess starts cmd, whose output goes to the file log.
func startProcess(cmd *exec.Cmd, log string) (*process, error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd, log, make(chan struct{})}
	go func() { cmd.Wait(); close(p.done) }()
	return p, nil
}

// await returns when ready does so without an error.
func (p *process) await(ready func() error) error {
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s has ended: %v\n%s", p.cmd, p.cmd.ProcessState, tail(p.log))
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s does not answer: %w\n%s", p.cmd, err, tail(p.log))
		}
	}
}

// tail returns the end of a log.
func tail(name string) string {
	b, _ := os.ReadFile(name)
	return string(b[max(0, len(b)-2000):])
}

// peak returns the most memory that a process and those that it started have had, each by itself, in bytes.
func peak(pid int) int64 {
	var sum int64
	for p := range family(pid) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p))
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "VmHWM:" {
				kib, _ := strconv.ParseInt(f[1], 10, 64)
				sum += kib << 10
			}
		}
	}
	return sum
}

// family returns a process and those that come from it.
func family(pid int) map[int]bool {
	parents := parents()
	in := map[int]bool{pid: true}
	for more := true; more; {
		more = false
		for p, parent := range parents {
			if in[parent] && !in[p] {
				in[p], more = true, true
			}
		}
	}
	return in
}

// parents returns the parent of each process in the namespace.
func parents() map[int]int {
	all := map[int]int{}
	dirs, _ := os.ReadDir("/proc")
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		// The name, in parentheses, may have spaces and parentheses. Then come the state and the parent.
		if f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])); len(f) > 1 {
			all[pid], _ = strconv.Atoi(f[1])
		}
	}
	return all
}

// killOthers ends all processes in the namespace but those that are to be kept. It is for process namespaces of one's own.
func killOthers(keep ...int) error {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		left := 0
		for pid := range parents() {
			if !slices.Contains(keep, pid) {
				unix.Kill(pid, unix.SIGKILL)
				left++
			}
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d processes were killed and are still there", left)
		}
	}
}

// A mount is one of the namespace.
type mount struct {
	id       int // the kernel uses it again
	at, kind string
}

// mounts returns those of the namespace in order.
func mounts() (list []mount, err error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		before, after, _ := strings.Cut(line, " - ")
		if f, g := strings.Fields(before), strings.Fields(after); len(f) > 4 && len(g) > 0 {
			id, _ := strconv.Atoi(f[0])
			list = append(list, mount{id, f[4], g[0]})
		}
	}
	return list, err
}

// unmountOthers unmounts what is not to be kept, the last first, until the kernel says that there is nothing left.
func unmountOthers(keep []mount) error {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		others, err := mounts()
		if err != nil {
			return err
		}
		others = slices.DeleteFunc(others, func(m mount) bool { return slices.Contains(keep, m) })
		if len(others) == 0 {
			return nil
		}
		for _, m := range slices.Backward(others) {
			if err = unix.Unmount(m.at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				err = fmt.Errorf("unmount %s: %w", m.at, err)
			}
		}
		if time.Now().After(end) {
			return errors.Join(fmt.Errorf("%d mounts are left", len(others)), err)
		}
	}
}

// letGo unmounts in this namespace what others on this machine have mounted of the kinds that are made and removed here: a copy of a mount
// keeps what it is of, and they may wait for its end.
func letGo(needed ...string) error {
	list, err := mounts()
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(list) {
		passing := m.kind == "overlay" || m.kind == "erofs" || strings.HasPrefix(m.kind, "fuse")
		if passing && m.at != "/" && !slices.ContainsFunc(needed, func(dir string) bool { return strings.HasPrefix(dir+"/", m.at+"/") }) {
			unix.Unmount(m.at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) // it may be gone with one below it
		}
	}
	return nil
}

// A cgroup counts the time of the processor. There are two versions.
type cgroup struct{ dir, usage string }

// makeCgroup makes one, in the hierarchy of version 2 or, where that is not at the top, of version 1 for the time of the processor.
func makeCgroup(name string) (cgroup, error) {
	c := cgroup{"/sys/fs/cgroup", "cpu.stat"}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		c = cgroup{"/sys/fs/cgroup/cpuacct", "cpuacct.usage"}
	}
	c.dir = filepath.Join(c.dir, name)
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return c, err
	}
	_, err := c.seconds()
	return c, err
}

// seconds returns the time that all that were in it, or below it, have used.
func (c cgroup) seconds() (float64, error) {
	b, err := os.ReadFile(filepath.Join(c.dir, c.usage))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b))
	unit := 1e9
	if c.usage == "cpu.stat" {
		if len(f) < 2 || f[0] != "usage_usec" {
			return 0, fmt.Errorf("%s/%s: no usage_usec", c.dir, c.usage)
		}
		f, unit = f[1:], 1e6
	}
	n, err := strconv.ParseInt(f[0], 10, 64)
	return float64(n) / unit, err
}

// command returns a command that runs in the cgroup.
func (c cgroup) command(program string, args ...string) *exec.Cmd {
	return exec.Command("/bin/sh", append([]string{"-c", `echo 0 > "$0"; exec "$@"`, filepath.Join(c.dir, "cgroup.procs"), program}, args...)...)
}

// removeCgroups removes all of a name, which are empty.
func removeCgroups(name string) error {
	var err error
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		list, _ := filepath.Glob(pattern + name)
		for _, dir := range list {
			err = errors.Join(err, removeCgroup(dir))
		}
	}
	return err
}

func removeCgroup(dir string) error {
	list, err := os.ReadDir(dir)
	for _, e := range list {
		if e.IsDir() {
			err = errors.Join(err, removeCgroup(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(err, os.Remove(dir))
}
