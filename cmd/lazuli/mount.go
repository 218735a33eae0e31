package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"lazuli/fs/rootfs"
)

func newMountCommand(a *app) *cobra.Command {
	var rw, fill, detached bool
	cmd := &cobra.Command{
		Use:   "mount [flags] IMAGE DIR",
		Short: "Show an image's root at a directory",
		Long: `Mount shows the root of IMAGE at DIR, an empty directory, before the image's files are here: they are fetched when they
are read. If a daemon runs, it serves them until lazuli umount. Else this process does: it stays in the foreground until lazuli umount or
Ctrl-C, or with --detach goes on behind.

IMAGE is NAME[:TAG] of a registry (with docker's credentials), oci:DIR[:TAG] or docker-archive:FILE[:TAG].
Layers that are not lazy are fetched whole first, and a line says so.`,
		Example: `  lazuli mount localhost:5000/python:lazy /mnt
  lazuli mount --detach oci:./lazy /mnt && ls /mnt; lazuli umount /mnt
  lazuli mount --rw --fill localhost:5000/python:lazy /mnt`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if detached && !isDetached() && a.client() == nil {
				return detach(cmd.Context(), cmd.ErrOrStderr(), cmd.OutOrStdout())
			}
			ctx, stderr := cmd.Context(), cmd.ErrOrStderr()
			ref, err := parseReference(args[0])
			if err != nil {
				return err
			}
			h, err := a.host(stderr)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, h.Close()) }()
			m, err := h.mount(ctx, ref, args[1], rw, fill, false, stderr)
			if err != nil {
				return err
			}
			if m.wait == nil {
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "%v is mounted at %s, served by the daemon until: lazuli umount %[2]s\n", ref, m.dir)
				return err
			}
			defer func() { err = errors.Join(err, m.close()) }()
			if detached {
				if err := ready(fmt.Sprintf("%v is mounted at %s, served by process %d until: lazuli umount %[2]s", ref, m.dir, os.Getpid())); err != nil {
					return err
				}
			} else {
				fmt.Fprintf(cmd.OutOrStdout(), "%v is mounted at %s, served by this process until Ctrl-C or: lazuli umount %[2]s\n", ref, m.dir)
			}
			if err := m.wait(ctx); err != nil && ctx.Err() == nil {
				return err
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&rw, "rw", false, "with a writable layer, which is thrown away at the end")
	f.BoolVar(&fill, "fill", false, "fetch the rest of the image in the background")
	f.BoolVarP(&detached, "detach", "d", false, "return when the mount is there, and serve it from behind")
	return cmd
}

func newUmountCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "umount DIR",
		Aliases: []string{"unmount"},
		Short:   "End a mount",
		Long: `Umount unmounts the image at DIR, and the process that served it ends. While a program works in DIR or has
a file of it open, the image stays mounted, and the exit code is 1.`,
		Example: "  lazuli umount /mnt",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return rootfs.Unmount(a.Root, args[0])
		},
	}
}
