package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"

	"lazuli/cmd/lazuli/internal/registry"
)

func newRegistryCommand(a *app) *cobra.Command {
	var dir, addr, accessLog string
	cmd := &cobra.Command{
		Use:   "registry --dir DIR",
		Short: "Serve a small registry from a directory",
		Long: `Registry serves images from a directory until Ctrl-C, for demos and tests: without TLS and without
passwords, so leave it on this machine's own address. What was pushed is there again the next time.
It prints one line when it is ready. With port 0, that line says which port it got.

The access log has a line for each request: time, method, path, Range header or "-", status, bytes sent, duration.`,
		Example: `  lazuli registry --dir /tmp/registry
  lazuli registry --dir /tmp/registry --addr 127.0.0.1:0 --access-log /tmp/access.log`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if dir == "" {
				return &usageError{errors.New("registry: --dir DIR: say where the images are to be kept")}
			}
			reg, err := registry.Open(dir)
			if err != nil {
				return fmt.Errorf("registry: %w", err)
			}
			defer reg.Close()
			h := http.Handler(reg)
			if accessLog != "" {
				w := io.Writer(cmd.ErrOrStderr())
				if accessLog != "-" {
					f, err := os.OpenFile(accessLog, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
					if err != nil {
						return fmt.Errorf("access log: %w", err)
					}
					defer f.Close()
					w = f
				}
				h = registry.Log(h, w)
			}
			l, err := net.Listen("tcp", addr)
			if err != nil {
				return fmt.Errorf("registry: %w: choose another address with --addr", err)
			}
			// Nobody may hold a connection without asking; a body may take its time.
			server := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
			fmt.Fprintf(cmd.OutOrStdout(), "registry of %s ready at %s\n", dir, l.Addr())
			served := make(chan error, 1)
			go func() { served <- server.Serve(l) }()
			select {
			case err := <-served:
				return fmt.Errorf("registry: %w", err)
			case <-cmd.Context().Done():
			}
			// What is under way may end; a second Ctrl-C does not wait for it.
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			if server.Shutdown(ctx) != nil {
				server.Close()
			}
			<-served
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", "", "`DIR` with the images, made if it is not there")
	f.StringVar(&addr, "addr", "127.0.0.1:5000", "`ADDRESS:PORT` to listen at")
	f.StringVar(&accessLog, "access-log", "", "`FILE` for a line per request; - is stderr")
	return cmd
}
