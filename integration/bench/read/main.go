// Command read reads files in a container, as a job that needs so much of an image does.
//
//	read LIST
//
// LIST begins with a line that says how many bytes all the files have, and then has a path in each line. It says START, READY when all
// is read, and DONE.
package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"strings"
)

func main() {
	log.SetFlags(0)
	if err := read(os.Args[1]); err != nil {
		log.Fatalf("read: %v", err)
	}
}

func read(name string) error {
	list, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	fmt.Println("START")
	first, paths, _ := strings.Cut(string(list), "\n")
	want, err := strconv.ParseInt(first, 10, 64)
	if err != nil {
		return err
	}
	var sum int64
	buf := make([]byte, 128<<10)
	for path := range strings.Lines(paths) {
		f, err := os.Open(strings.TrimSuffix(path, "\n"))
		if err != nil {
			return err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		sum += n
	}
	if sum != want {
		return fmt.Errorf("the files have %d bytes, not %d", sum, want)
	}
	fmt.Println("READY")
	fmt.Println("DONE")
	return nil
}
