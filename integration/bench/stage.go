package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// The program runs in three stages, each of which starts the next:
//
//	start    as people start it: reads the command line, builds, waits, cleans up
//	init     process 1 of a process namespace: when it ends, the kernel ends everything that was started below it
//	measure  does the work
//
// The first kills the second when it is told to end, and the kernel does so when the first dies.
const (
	stageVariable = "LAZULI_BENCH_STAGE"
	planVariable  = "LAZULI_BENCH_PLAN"
)

// enter does what is planned in namespaces, and returns when nothing of it is left.
func (p *plan) enter(ctx context.Context) (err error) {
	// Not /tmp, which may lie in memory: what is measured writes to a disk.
	dir := os.Getenv("TMPDIR")
	if dir == "" {
		dir = "/var/tmp"
	}
	if p.Work, err = os.MkdirTemp(dir, "lazuli-bench"); err != nil {
		return err
	}
	p.Cgroup = filepath.Base(p.Work)
	defer func() { err = errors.Join(err, os.RemoveAll(p.Work), removeCgroups(p.Cgroup)) }()
	if len(p.Work) > 32 {
		return fmt.Errorf("%s is too long for the sockets in it: set TMPDIR to a folder with a shorter name", p.Work)
	}
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	// The signal at the parent's death comes at the death of the thread that started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c := exec.CommandContext(ctx, "/proc/self/exe")
	c.Env = append(os.Environ(), stageVariable+"=init", planVariable+"="+string(b))
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
		Pdeathsig:  unix.SIGKILL,
		Setpgid:    true, // ^C is for this process only
	}
	err = c.Run()
	if ctx.Err() != nil {
		return errors.New("stopped; what was measured before is in " + p.Out)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return errors.New("see above") // it has said why
	}
	return err
}

// initStage is process 1. It takes note of the end of processes that nobody else waits for.
func initStage() int {
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""),
		os.Setenv(stageVariable, "measure"),
	); err != nil {
		fmt.Fprintln(os.Stderr, "bench: in its namespaces:", err)
		return 1
	}
	p, err := os.StartProcess("/proc/self/exe", os.Args, &os.ProcAttr{Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			fmt.Fprintln(os.Stderr, "bench: wait:", err)
			return 1
		case pid == p.Pid && status.Exited():
			return status.ExitStatus()
		case pid == p.Pid:
			fmt.Fprintln(os.Stderr, "bench: ended by", status.Signal())
			return 1
		}
	}
}
