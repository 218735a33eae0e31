package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// The process behind a detached mount is this program, called the same way with
// this variable in its environment and a pipe as descriptor 3. It writes one line to the pipe when it is ready.
const (
	detachedEnv = "LAZULI_DETACHED"
	readyFD     = 3
)

func isDetached() bool { return os.Getenv(detachedEnv) != "" }

// detach starts this command line again in a session of its own, and waits until it is ready
// or has ended. What it has to say until then comes on this process's stderr.
func detach(ctx context.Context, stderr, stdout io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pr.Close()
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), detachedEnv+"=1")
	cmd.ExtraFiles = []*os.File{pw}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	pw.Close()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		var caught *signalError
		if errors.As(context.Cause(ctx), &caught) {
			cmd.Process.Signal(caught.signal)
		}
	})
	line, err := io.ReadAll(pr)
	if stop() && err == nil && strings.HasSuffix(string(line), "\n") {
		_, err := stdout.Write(line)
		return err
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return &exitError{code: exit.ExitCode()} // it has said why
	}
	return fmt.Errorf("the process behind the mount ended: %v", err)
}

// ready tells the process in front that it can go, and lets go of its terminal.
func ready(line string) error {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	if err := os.Chdir("/"); err != nil { // it may be unmounted some day
		return err
	}
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	f := os.NewFile(readyFD, "ready")
	_, err = fmt.Fprintln(f, line)
	return errors.Join(err, f.Close())
}
